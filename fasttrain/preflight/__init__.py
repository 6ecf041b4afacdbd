"""What a run will take, before it starts; whether each fused operation is right on a device."""
