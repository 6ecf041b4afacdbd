"""What a run will take, before it starts.

``__main__`` is the command line; ``plan`` shows size, memory, speed and warnings; ``scaling`` is
the traffic between ranks; ``kernels`` checks and times each fused operation on this device.
"""
