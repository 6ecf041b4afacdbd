"""Token data: shards on disk, their order, and batches ready for the step.

format.py     dataset folders: `dataset.json`, `open_dataset`, `TokenDataset`
files.py      errors, the cache folder, atomic writing
shards.py     shard files: llm.c header, reading, range check
gather.py     many pieces of mapped files copied in one call, and without SIGBUS
dataset.py    a split: its shards as one long array, where its documents end; several as one
writer.py     writing them
sampler.py    order: a keyed bijection from sample index to sample
batching.py   samples: packed, sliding, padded, bucketed; which tokens each holds
mixing.py     several datasets in exact proportions
batch.py      what a micro-batch is
loader.py     batches: background reading, prefetch
held_out.py   batches of the held-out split, every target once
splitting.py  which split a document belongs to, and its pieces
building.py   pieces to shards, with places to go on from
encoding.py   encoding in several processes
partial.py    what an interrupted preparation left, and going on with it
fast_bpe.py   byte-level BPE through tiktoken, proven to give the same ids
losses.py     what of a text a tokenizer has no token for
tokenizer.py  byte-level BPE, bytes and characters, all as `tokenizers` JSON
sources.py    documents from text, JSON lines, Parquet, compressed or not
inspection.py what is in a dataset folder, for people
corpus.py     the default text: the running Python's standard library
"""
