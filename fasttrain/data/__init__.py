"""Token data: shards on disk, their order, and batches ready for the step.

dataset.py    shard files, read without SIGBUS; a split: its shards as one long array of tokens
format.py     dataset folders: `dataset.json`, `open_dataset`
order.py      which tokens each sample of a run holds: permutation, mixing, batching
remote.py     shards at an address: fetched ahead into a bounded folder
loader.py     batches, read ahead in a thread; those of the held-out split, every target once
tokenizer.py  byte-level BPE, bytes and characters, all as `tokenizers` JSON; encoding
files.py      errors, addresses, the cache folder, atomic writing
prepare/      the write side: inputs, documents, splits, encoding, shards
"""
