"""The data room: text becomes tokens on disk, and tokens on disk become batches.

inputs and folders find files; compression, tar, kinds, columns and records read them; readers joins
these. Then parsing, encode, journal and store: what `meshlm data prepare` does, in order. tokenizer
and bpe turn text into token ids; loader draws batches from finished stores.

Level 3: it imports `core` and itself, and knows nothing of models, training or checkpoints.
"""
