"""Token data: shards on disk, their order, and batches ready for the step.

format.py     dataset folders: `dataset.json`, `open_dataset`, `TokenDataset`
files.py      errors, the cache folder, atomic writing
shards.py     shard files: llm.c header, reading, range check; several as one long array
writer.py     writing them
sampler.py    order: a keyed bijection from sample index to sample
loader.py     batches: background reading, prefetch, evaluation
tokenizer.py  byte-level BPE, bytes and characters, all as `tokenizers` JSON
sources.py    documents from text, JSON lines, Parquet, compressed or not
inspection.py what is in a dataset folder, for people
corpus.py     the default text: the running Python's standard library
"""
