"""Containers of arrays, from bytes to named arrays and back. They know no model.

tensor.py        shape and dtype of a tensor; the rows of an array, some at a time
content.py       the bytes of a file or of memory, any range of them
safetensors.py   tensors by name: read, and written in any order
npy.py           one array in numpy's format; npz.py, a file of them; npz_writer.py writes it
npz_stream.py    the arrays of an npz inside an archive, in the order of the file
byte_source.py   a stream of bytes, taken by exact counts
tar.py           the members of a tar archive; archive.py, the files of a `.tar.zst`

Input comes from strangers: sizes are compared with the bytes that are there before anything is
allocated, time is linear in the bytes read, and nothing is unpickled or mapped.
"""
