"""Causal attention over whole sequences in less memory and time, and the choice among its forms.

    plain     all scores at once (`attention.attend`): the reference, and the CPU's
    chunked   a chunk of queries at a time, in XLA alone: bounded memory on any device
    splash    JAX's own kernel for TPUs, from v4 on
    cudnn     NVIDIA's kernel, where its library takes the head's width

Dim letters: B batch, T query time, S key time, N heads, H head dim, C queries of a chunk.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from meshlm.core.errors import UsageError
from meshlm.core.sharding import spec
from meshlm.ops.attention import MASKED, attend, causal_mask

AttentionName = Literal["plain", "chunked", "splash", "cudnn"]
# What each platform would like best; the last needs no probe.
WISHES: dict[str, tuple[AttentionName, ...]] = {
    "tpu": ("splash", "chunked"),
    "gpu": ("cudnn", "chunked"),
    "cuda": ("cudnn", "chunked"),
    "cpu": ("plain",),
}
# A sequence has at most so many chunks: each is compiled by itself.
MAX_CHUNKS = 8
MIN_CHUNK = 256
SPLASH_BLOCK = 512
# The kernel's output is saved under this name by the policies of rematerialisation.
MIXED = "mixed"


def attend_causally(
    name: AttentionName,
    q_BTNH: Float[Array, "B T N H"],
    k_BNSH: Float[Array, "B N S H"],
    v_BNSH: Float[Array, "B N S H"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns causal attention's output in float32, a query seeing its own segment alone.

    Args:
        name: the form; all give the same up to rounding.
        q_BTNH: queries, S = T.
        k_BNSH: keys.
        v_BNSH: values.
        segment_ids_BT: the document of each token; None lets a token see all before it.
        interpret: run a TPU kernel on any platform, slowly: for tests.
    """
    with jax.named_scope(f"attention_{name}"):
        if name == "chunked":
            return _chunked(q_BTNH, k_BNSH, v_BNSH, segment_ids_BT)
        if name == "splash":
            return _splash(q_BTNH, k_BNSH, v_BNSH, segment_ids_BT, interpret)
        if name == "cudnn":
            # It would take documents only as a mask of all pairs.
            assert segment_ids_BT is None, "cudnn attention knows no documents"
            return _cudnn(q_BTNH, k_BNSH, v_BNSH)
        mask = causal_mask(q_BTNH.shape[1], segment_ids_BT)
        return attend(q_BTNH, k_BNSH, v_BNSH, mask)


def _chunked(
    q_BTNH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """A chunk of queries looks at the keys up to its own end; its scores are not kept."""
    length = q_BTNH.shape[1]
    size = max(MIN_CHUNK, -(-length // MAX_CHUNKS))
    chunks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        segments = None if segment_ids_BT is None else segment_ids_BT[:, :stop]
        chunk = functools.partial(_one_chunk, start=start)
        chunks.append(
            jax.checkpoint(chunk)(
                q_BTNH[:, start:stop], k_BNSH[:, :, :stop], v_BNSH[:, :, :stop], segments
            )
        )
    return jnp.concatenate(chunks, axis=1)


def _one_chunk(
    q_BCNH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    segment_ids_BS: jax.Array | None,
    *,
    start: int,
) -> jax.Array:
    rows, columns = q_BCNH.shape[1], k_BNSH.shape[2]
    shape = (1, 1, rows, columns)
    query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (2, 3))
    mask = key <= query + start
    if segment_ids_BS is not None:
        own = segment_ids_BS[:, start:]
        mask = mask & (own[:, None, :, None] == segment_ids_BS[:, None, None, :])
    return attend(q_BCNH, k_BNSH, v_BNSH, mask)


def _splash(
    q_BTNH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    segment_ids_BT: jax.Array | None,
    interpret: bool,
) -> jax.Array:
    # Imported here: it takes a second, and most machines have no TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    dtype = q_BTNH.dtype
    scale = 1 / math.sqrt(q_BTNH.shape[-1])
    q_BNTH = (q_BTNH.astype(jnp.float32) * scale).astype(dtype).transpose(0, 2, 1, 3)

    def on_one_device(
        q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, *ids: jax.Array
    ) -> Any:
        _, heads, length, _ = q_BNTH.shape
        size = math.gcd(SPLASH_BLOCK, length)
        blocks = kernels.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        )
        kernel = kernels.make_splash_mha(
            mask=masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
            block_sizes=blocks,
            mask_value=MASKED,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=MIXED,
            interpret=interpret,
        )
        segments = kernels.SegmentIds(ids[0], ids[0]) if ids else None
        each_row: Any = jax.vmap(kernel)
        return each_row(q_BNTH, k_BNSH, v_BNSH, segments)

    ids = () if segment_ids_BT is None else (segment_ids_BT,)
    mixed_BNTH = _on_each_device(on_one_device, q_BNTH, k_BNSH, v_BNSH, *ids)
    return mixed_BNTH.astype(jnp.float32).transpose(0, 2, 1, 3)


def _cudnn(q_BTNH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array) -> jax.Array:
    def on_one_device(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array) -> jax.Array:
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BNTH, k_BNSH, v_BNSH))
        mixed_BTNH = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return mixed_BTNH.transpose(0, 2, 1, 3)

    mixed_BNTH = _on_each_device(on_one_device, q_BTNH.transpose(0, 2, 1, 3), k_BNSH, v_BNSH)
    return mixed_BNTH.astype(jnp.float32).transpose(0, 2, 1, 3)


def _on_each_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Runs a kernel, which knows no mesh, on each device's own rows and heads."""
    heads, rows = spec("batch", "heads", None, None), spec("batch", None)
    if heads is None or rows is None:
        return kernel(*arrays)
    in_specs = tuple(heads if x.ndim == 4 else rows for x in arrays)
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=heads, check_vma=False)(*arrays)


def choose_attention(
    mesh: jax.sharding.Mesh, *, length: int, head_dim: int, dtype: Any, documents: bool
) -> AttentionName:
    """Returns the best form that compiles, with its gradient, for the mesh's devices.

    Args:
        mesh: of devices that are here or only described (ahead-of-time compilation).
        length: tokens of a sequence.
        head_dim: the width of a head.
        dtype: of queries, keys and values.
        documents: tokens see their own document alone.
    """
    *wishes, last = WISHES.get(mesh.devices.flat[0].platform, ("chunked",))
    for name in wishes:
        if _compiles(name, mesh, length, head_dim, dtype, documents):
            return name
    return last


def check_attention(
    name: AttentionName,
    mesh: jax.sharding.Mesh,
    *,
    length: int,
    head_dim: int,
    dtype: Any,
    documents: bool,
) -> None:
    """Raises UsageError where a form that was asked for does not compile for these devices."""
    if name in ("plain", "chunked") or _compiles(name, mesh, length, head_dim, dtype, documents):
        return
    kind = mesh.devices.flat[0].device_kind
    with_documents = " and a document mask" if documents else ""
    raise UsageError(
        f"--attention {name}: it does not compile for {kind} with heads of {head_dim}"
        f"{with_documents}: leave it out, and the best that does is chosen"
    )


def _compiles(
    name: AttentionName,
    mesh: jax.sharding.Mesh,
    length: int,
    head_dim: int,
    dtype: Any,
    documents: bool,
) -> bool:
    device = _own_device(mesh)
    alone = jax.sharding.Mesh([device], ("probe",))
    where = NamedSharding(alone, PartitionSpec())

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        return jnp.sum(attend_causally(name, q, k, v, ids))

    q = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype, sharding=where)
    k = jax.ShapeDtypeStruct((1, 1, length, head_dim), dtype, sharding=where)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=where) if documents else None
    with contextlib.suppress(Exception):  # whatever a compiler says no with
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, ids).compile()
        return True
    return False


def _own_device(mesh: jax.sharding.Mesh) -> Any:
    """Returns a device of the mesh that this process has, where it has one."""
    devices = list(mesh.devices.flat)
    return next((d for d in devices if d.process_index == jax.process_index()), devices[0])
