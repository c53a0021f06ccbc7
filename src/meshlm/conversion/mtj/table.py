"""The tensors of mesh-transformer-jax's GPT-J, in the order of a shard's tree.

Haiku's weights are [in, out], those of MeshLM [out, in]. Each shard has some rows or columns of a
matrix, a share of the biases that are summed, and its own copy of the norms, of which the first is
trained. Shares get the same gradients, so the moments of each share are those of the sum.

Dim letters: S shards, V vocabulary rows, D model, N heads, H head dim, F feed-forward; small ones
are of one shard.

Source: mesh-transformer-jax, layers.py, to_hf_weights.py:160-249.
"""

from meshlm.conversion.layout import Rearranged
from meshlm.conversion.mtj.shares import Replicas, Shares
from meshlm.conversion.table import Row, Table

_TO_HEADS = Rearranged("(S n) H D -> S D (n H)")
_FROM_HEADS = Rearranged("D (S n) H -> S (n H) D")
_UP = Rearranged("(S f) D -> S D f")
_UP_BIAS = Rearranged("(S f) -> S f")
_DOWN = Rearranged("D (S f) -> S f D")
_EMBEDDING = Rearranged("(S v) D -> S v D")
_HEAD = Rearranged("(S v) D -> S D v")
_HEAD_BIAS = Rearranged("(S v) -> S v")
_SHARES, _COPIES = Shares(), Replicas(fill=None)
_ONES, _ZEROS = Replicas(fill=1), Replicas(fill=0)

_L, _B = "layer_{layer}/", "blocks.{layer}."
_E, _P = "embedding_shard/", "projection_shard/"
_NORM = "replicated_layer_norm/"

GPT_J = Table(
    Row(f"{_E}linear/b", "embedding.bias", _SHARES, moments=_COPIES),
    Row(f"{_E}linear/w", "embedding.tokens", _EMBEDDING),
    Row(f"{_L}linear/w", f"{_B}attention.query.weight", _TO_HEADS),
    Row(f"{_L}linear_1/w", f"{_B}attention.value.weight", _TO_HEADS),
    Row(f"{_L}linear_2/w", f"{_B}attention.key.weight", _TO_HEADS),
    Row(f"{_L}linear_3/w", f"{_B}attention.out.weight", _FROM_HEADS),
    Row(f"{_L}linear_4/b", f"{_B}feed_forward.up.bias", _UP_BIAS),
    Row(f"{_L}linear_4/w", f"{_B}feed_forward.up.weight", _UP),
    Row(f"{_L}linear_5/b", f"{_B}feed_forward.down.bias", _SHARES, moments=_COPIES),
    Row(f"{_L}linear_5/w", f"{_B}feed_forward.down.weight", _DOWN),
    Row(f"{_L}{_NORM}offset", f"{_B}attention_norm.offset", _ZEROS),
    Row(f"{_L}{_NORM}scale", f"{_B}attention_norm.scale", _ONES, moments=_ZEROS),
    Row(f"{_P}linear/b", "head.bias", _HEAD_BIAS),
    Row(f"{_P}linear/w", "head.weight", _HEAD),
    Row(f"{_P}{_NORM}offset", "final_norm.offset", _ZEROS),
    Row(f"{_P}{_NORM}scale", "final_norm.scale", _ONES, moments=_ZEROS),
)
