"""Work counted by hand and by the compiler, exchanges on rings by hand, and what a step follows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig
from meshlm.model.flops import flops_per_token, matmul_params
from meshlm.planning import prediction
from meshlm.planning.compiling import Collective, Compiled, Traffic
from meshlm.planning.hlo import read_program
from meshlm.planning.links import find_route, transfer_s
from meshlm.planning.prediction import executed_flops, predict, predict_work
from meshlm.planning.topology import find_topology
from meshlm.planning.work import Attended, best_attention, check_form, count_work, wire_bytes
from planned import GPTJ, setup_of, with_links

V3 = find_topology("v3:16x8")
POD = setup_of(accumulate=8, data=32, model=8)


HEAD = 4096 * 50_400
TOKENS = 512 * 2048 / 256


def test_flops_are_the_models_without_recomputation():
    """But for the logits, which are made a second time for the backward pass."""
    work = count_work(setup_of(remat="none", data=32, model=8))
    assert work.product_flops == (6 * matmul_params(GPTJ) + 2 * HEAD) * TOKENS
    # Whole squares, of which the model's own count has the half that a token sees.
    assert work.product_flops - 2 * HEAD * TOKENS + work.attention_flops == pytest.approx(
        (flops_per_token(GPTJ, 2048) + 6 * 28 * 2048 * 4096) * TOKENS
    )
    # Few tokens have their logits at once.
    few = count_work(setup_of(remat="none", data=32, model=8, batch_size=32, seq_len=512))
    assert few.product_flops == 6 * matmul_params(GPTJ) * 32 * 512 / 256


@pytest.mark.parametrize(
    ("attention", "remat", "products", "keys"),
    [
        ("plain", "none", 6, 2048),
        ("plain", "minimal", 7, 2048),
        ("plain", "full", 8, 2048),
        # Eight chunks: a query sees 1, 2, ... 8 of them, 4.5 on average.
        ("chunked", "none", 7, 4.5 * 256),
        ("chunked", "full", 9, 4.5 * 256),
        ("splash", "minimal", 9, 2.5 * 512),
        ("splash", "full", 11, 2.5 * 512),
        ("cudnn", "none", 7, 8.5 * 128),
    ],
)
def test_flops_of_attention(attention, remat, products, keys):
    setup = setup_of(remat=remat, attention=attention, data=32, model=8)
    by_hand = 2 * products * keys * 28 * 4096 / 8 * (512 * 2048 / 32)
    assert count_work(setup).attention_flops == by_hand


def test_flops_computed_again():
    """Nobody asks for the results of the two products that write to the stream: 7 of 12 parts."""
    twice = count_work(setup_of(data=32, model=8)).product_flops
    once = count_work(setup_of(remat="minimal", data=32, model=8)).product_flops
    assert twice - once == pytest.approx(2 * TOKENS * 28 * 7 * 4096**2)


def test_flops_are_the_compilers():
    """Products in the text that libtpu 0.0.50.1 (JAX 0.12.0.1) gave, loops multiplied, 2026-11-22.

    For v3:16x8 with all logits at once; for v5e:16x16 without what the attention's kernel does.
    """
    work = count_work(POD)
    found = work.product_flops + work.attention_flops - 2 * HEAD * TOKENS
    assert found == pytest.approx(1.859e14, rel=0.001)
    work = count_work(setup_of(sharding="fsdp", data=256, attention="splash"))
    assert work.product_flops == pytest.approx(1.722e14, rel=0.001)
    # Its traffic outside of products, within what counting passes can do.
    assert work.traffic_bytes == pytest.approx(2.05e11, rel=0.15)


def test_sums_of_activations_under_tensor_parallelism():
    """One float32 sum forward and one of bfloat16 backward a layer and part (GPTJ.md), one more for
    the head's input; one joining of looked-up columns."""
    found = [t for t in count_work(POD).transfers if t.of == "activations"]
    assert {t.axes for t in found} == {("model",)}
    stream = 2 * 2048 * 4096  # rows of a part, tokens, width
    sums = [(t.bytes, t.count) for t in found if t.op == "all-reduce"]
    assert sums == [(4 * stream, 28 * 8), (2 * stream, 28 * 8), (2 * stream, 8)]
    assert [(t.bytes, t.count) for t in found if t.op == "all-gather"] == [(4 * stream, 8)]


def test_weights_are_gathered_twice_and_gradients_reduced_once():
    work = count_work(setup_of(sharding="fsdp", data=256, batch_size=256))
    of_layers = [t for t in work.transfers if t.count >= 28]
    layer = 12 * 4096**2
    gather, reduce = of_layers
    assert (gather.op, gather.count) == ("all-gather", 56)
    assert (reduce.op, reduce.count) == ("reduce-scatter", 28)
    # The biases and norms of a layer are a ten thousandth of it, and stay whole.
    assert gather.bytes == pytest.approx(2 * layer, rel=2e-4)
    assert reduce.bytes == pytest.approx(4 * layer, rel=2e-4)
    assert {t.of for t in work.transfers} == {"weights", "gradients"}
    kept = count_work(setup_of(sharding="fsdp", data=256, batch_size=256, remat="none"))
    assert {t.count for t in kept.transfers if t.op == "all-gather"} == {28, 1}


def test_copies_of_the_weights_sum_gradients_once():
    for accumulate in (1, 4):
        work = count_work(setup_of(replica=4, data=64, batch_size=1024, accumulate=accumulate))
        (copies,) = [t for t in work.transfers if t.axes == ("replica",)]
        assert (copies.op, copies.count, copies.of) == ("all-reduce", 1, "gradients")
        assert copies.bytes == pytest.approx(4 * 6.05e9 / 64, rel=0.01)
    assert not count_work(setup_of(batch_size=1)).transfers


def test_bytes_on_a_ring():
    assert wire_bytes("all-gather", 800, 8) == 700
    assert wire_bytes("reduce-scatter", 800, 8) == 700
    assert wire_bytes("all-reduce", 800, 8) == 1400
    assert wire_bytes("collective-permute", 800, 8) == 800
    assert wire_bytes("all-reduce", 800, 1) == 0


def test_routes_on_a_torus():
    v5e = find_topology("v5e:16x16")
    link = v5e.interconnect.link_bytes_per_s
    # A whole dim has two links into each chip, both dims four; half a dim is a line.
    assert find_route(("model",), MeshConfig(data=16, model=16), v5e).bytes_per_s == 2 * link
    assert find_route(("data",), MeshConfig(data=256), v5e).bytes_per_s == 4 * link
    assert find_route(("model",), MeshConfig(data=32, model=8), v5e).bytes_per_s == link
    both = MeshConfig(data=16, model=16)
    assert find_route(("data", "model"), both, v5e).bytes_per_s == 4 * link
    # 2 GB in a ring of 16, fifteen sixteenths of it over two links.
    seconds = transfer_s("all-gather", 2e9, ("data",), both, v5e)
    assert seconds == pytest.approx(2e9 * 15 / 16 / (2 * link), rel=1e-3)
    assert transfer_s("all-gather", 2e9, ("replica",), both, v5e) == 0


def test_cores_of_a_chip_share_its_links():
    link = V3.interconnect.link_bytes_per_s
    # `model` takes both cores of 2 x 2 chips: two lines. A ring of `data` has one core of a chip,
    # the other core is in another ring, which has the same two lines at the same time.
    mesh = MeshConfig(data=32, model=8)
    assert find_route(("model",), mesh, V3).bytes_per_s == 2 * link
    assert find_route(("data",), mesh, V3).bytes_per_s == link
    assert find_route(("data",), MeshConfig(data=256), V3).bytes_per_s == 2 * link
    # Two cores of a chip meet in its memory.
    alone = find_route(("model",), MeshConfig(data=128, model=2), V3)
    assert alone.bytes_per_s == V3.facts.bandwidth_bytes_per_s
    assert alone.hops == 1


def test_routes_between_hosts_of_gpus():
    h100 = find_topology("H100:64")
    links = h100.interconnect
    inside = find_route(("model",), MeshConfig(data=8, model=8), h100)
    assert inside.bytes_per_s == links.link_bytes_per_s
    outside = find_route(("data",), MeshConfig(data=8, model=8), h100)
    assert outside.bytes_per_s == links.network_bytes_per_s
    # Eight of a group on each host bring its data in together.
    whole = find_route(("data",), MeshConfig(data=64), h100)
    assert whole.bytes_per_s == min(links.link_bytes_per_s, 8 * links.network_bytes_per_s)


def test_exchanges_between_slices():
    """Within each slice first, then a device's part with its counterparts in the others."""
    four, one = find_topology("4xv5e:16x16"), find_topology("v5e:16x16")
    network = four.interconnect.network_bytes_per_s
    assert network == 3.125e9
    mesh = MeshConfig(replica=4, data=256)
    alone = transfer_s("all-reduce", 1e9, ("replica",), mesh, four)
    assert alone == pytest.approx(2 * 1e9 * 3 / 4 / network)
    within = transfer_s("all-reduce", 1e9, ("data",), mesh, four)
    assert within == transfer_s("all-reduce", 1e9, ("data",), MeshConfig(data=256), one)
    both = transfer_s("all-reduce", 1e9, ("replica", "data"), mesh, four)
    assert both == pytest.approx(within + 2 * 1e9 / 256 * 3 / 4 / network)
    # Two copies in each slice: what the compiler says of either part.
    mesh = MeshConfig(replica=8, data=128)
    options = {"axes": ("replica",), "mesh": mesh, "topology": four}
    inside = transfer_s("all-reduce", 1e9, **options, group=2)
    across = transfer_s("all-reduce", 5e8, **options, group=4, between_slices=True)
    # As compiled: weights come from other slices in parts, gradients are summed there whole.
    gather, scatter = (transfer_s(op, 1e9, **options) for op in ("all-gather", "reduce-scatter"))
    assert scatter - gather == pytest.approx(5e8 * 3 / 4 / network)
    # A permutation within slices is not the network's, whatever the size of the axis.
    assert transfer_s("collective-permute", 1e9, **options, group=8) < 0.1 * across
    assert across == pytest.approx(2 * 5e8 * 3 / 4 / network)
    assert inside < 0.1 * across
    assert transfer_s("all-reduce", 1e9, **options) == pytest.approx(inside + across)


def test_a_network_that_is_not_known_is_told():
    v4 = find_topology("2xv4:4x4x4")
    found = predict(setup_of(sharding="replica-fsdp", replica=2, data=64, batch_size=128), v4)
    assert found.interconnect_s["replica"] == 0
    assert "no speed of their network is known" in " ".join(found.assumptions)
    # The links within a slice are known all the same.
    mesh = MeshConfig(replica=2, data=64)
    both, within = (
        transfer_s("all-gather", 1e9, axes, mesh, v4) for axes in (("replica", "data"), ("data",))
    )
    assert both == within > 0


def test_a_slow_network_shows_where_there_is_nothing_to_hide_behind():
    two = find_topology("2xv5e:16x16")
    slow = dataclasses.replace(two.interconnect, network_bytes_per_s=3.125e6)
    setup = setup_of(sharding="replica-fsdp", replica=2, data=256, batch_size=512)
    fast, late = (
        predict(setup, dataclasses.replace(two, interconnect=links))
        for links in (two.interconnect, slow)
    )
    own = 4 * 6_050_882_784 / 256
    # Biases and norms are whole on each device.
    assert fast.interconnect_s["replica"] == pytest.approx(own / 3.125e9, rel=0.05)
    alone = predict(setup_of(sharding="fsdp", data=256, batch_size=256), find_topology("v5e:16x16"))
    assert fast.step_s == pytest.approx(alone.step_s)  # it hides
    assert late.step_s > own / 3.125e6 > 10 * fast.step_s


def test_nothing_known_of_links_is_told():
    blind = with_links(V3, None)
    assert transfer_s("all-gather", 1e9, ("data",), POD.mesh, blind) is None
    found = predict(POD, blind)
    assert found.exposed_s == 0
    assert "no speed of the links is known" in " ".join(found.assumptions)


def test_the_step_is_the_sum_of_its_parts():
    found = predict(POD, V3)
    assert found.step_s == pytest.approx(found.compute_s + found.hbm_s + found.exposed_s)
    assert found.peak_flops_per_s == V3.facts.peak_flops == 61.5e12
    assert found.mfu == pytest.approx(
        flops_per_token(GPTJ, 2048) * 2**20 / (found.step_s * 61.5e12 * 256)
    )
    assert found.model_flops * 256 == flops_per_token(GPTJ, 2048) * 2**20
    assert found.tokens_per_s == pytest.approx(2**20 / found.step_s)
    work = count_work(POD)
    flops = work.product_flops + work.attention_flops
    assert found.compute_s == pytest.approx(flops / prediction.PRODUCT_EFFICIENCY / 61.5e12)
    assert set(found.interconnect_s) == {"data", "model"}
    assert found.exposed_s == pytest.approx(sum(found.interconnect_s.values()))


def test_hidden_exchanges_show_where_there_is_nothing_to_hide_behind():
    v5e = find_topology("v5e:16x16")
    setup = setup_of(sharding="fsdp", data=256, batch_size=256)
    work = count_work(setup)
    all_beside = tuple(dataclasses.replace(t, overlapped=True) for t in work.transfers)
    beside = dataclasses.replace(work, transfers=all_beside)
    found = predict_work(setup, with_links(v5e, 1e8), beside)
    assert found.exposed_s == pytest.approx(
        sum(found.interconnect_s.values()) - found.compute_s - found.hbm_s
    )
    assert predict_work(setup, v5e, beside).exposed_s == 0
    # By formula gradients are waited for.
    waited = predict_work(setup, v5e, work)
    assert 0 < waited.exposed_s < sum(waited.interconnect_s.values())
    # And on v3 everything is.
    apart = predict_work(setup, V3, work)
    assert apart.exposed_s == pytest.approx(sum(apart.interconnect_s.values()))
    # GPUs overlap both.
    h100 = find_topology("H100:256")
    assert predict_work(setup, h100, work).exposed_s == 0


def test_a_unit_wider_than_a_head_works_in_vain():
    v6e = find_topology("v6e:16x16")
    shape = dataclasses.replace(GPTJ, num_heads=32, head_dim=128)
    wide, narrow = (setup_of(s, data=256, remat="none") for s in (GPTJ, shape))
    first, second = (predict(setup, v6e).compute_s for setup in (wide, narrow))
    attention = count_work(wide).attention_flops
    peak = prediction.PRODUCT_EFFICIENCY * v6e.facts.peak_flops
    assert second - first == pytest.approx(attention / peak)
    v5e = find_topology("v5e:16x16")
    assert predict(wide, v5e).compute_s == pytest.approx(predict(narrow, v5e).compute_s)


def test_the_compiled_step_replaces_the_formulas():
    collective = Collective(
        op="all-reduce",
        axes=("model",),
        dtype="f32",
        bytes=10**9,
        count=10,
        group_size=8,
        where="forward",
    )
    traffic = (Traffic(flops=0, bytes=9e9), Traffic(flops=61.5e12, bytes=450e9 + 1e9))
    compiled = Compiled(fits=True, flops=3e14, collectives=(collective,), traffic=traffic)
    by_formula, found = predict(POD, V3), predict(POD, V3, compiled)
    one = transfer_s("all-reduce", 1e9, ("model",), POD.mesh, V3)
    assert found.exposed_s == pytest.approx(10 * one)
    assert found.compute_s == pytest.approx(3e14 / prediction.PRODUCT_EFFICIENCY / 61.5e12)
    # What has no products, and of the others what a second of products leaves over.
    assert found.hbm_s == pytest.approx(10e9 / 450e9)
    assert "the compiled step" in found.assumptions[0]
    assert "formulas" in by_formula.assumptions[0]
    assert predict(POD, V3, Compiled(fits=False)).step_s == by_formula.step_s


def test_what_the_compiler_says_of_slices_is_timed_part_by_part():
    four = find_topology("4xv5e:16x16")
    setup = setup_of(sharding="replica-fsdp", replica=8, data=128, batch_size=1024)
    within, between = (
        Collective(
            op="all-reduce",
            axes=("replica",),
            dtype="f32",
            bytes=10**9,
            count=1,
            group_size=size,
            where="update",
            between_slices=size == 4,
        )
        for size in (2, 4)
    )

    def seconds(*collectives: Collective) -> float:
        compiled = Compiled(fits=True, flops=1e12, collectives=collectives)
        return predict(setup, four, compiled).interconnect_s["replica"]

    alone = find_route(("replica",), setup.mesh, four).bytes_per_s
    assert seconds(within) == pytest.approx(1e9 / alone, rel=0.01)
    assert seconds(between) == pytest.approx(2 * 1e9 * 3 / 4 / 3.125e9)
    assert seconds(within, between) == pytest.approx(seconds(within) + seconds(between))


def test_a_kernels_flops_are_the_formulas():
    v5e = find_topology("v5e:16x16")
    setup = setup_of(attention="splash", data=256, sharding="fsdp")
    work = count_work(setup)
    compiled = Compiled(fits=True, flops=work.product_flops, traffic=(Traffic(flops=0, bytes=1),))
    assert executed_flops(setup, work, compiled) == work.product_flops + work.attention_flops
    assert predict(setup, v5e, compiled).compute_s == predict(setup, v5e).compute_s
    plain = setup_of(data=256, sharding="fsdp")
    assert executed_flops(plain, count_work(plain), compiled) == compiled.flops


def test_no_data_sheet_no_prediction():
    facts = dataclasses.replace(V3.facts, peak_flops=None)
    with pytest.raises(UsageError, match="no data sheet is known for TPU v3"):
        predict(POD, dataclasses.replace(V3, facts=facts))


def test_traffic_is_all_there_is():
    """A product and a loop of sums, in the text of a program compiled here."""

    def program(x, w):
        y = x @ w
        return jax.lax.fori_loop(0, 7, lambda i, y: y + jnp.roll(y, 1, 0) * i, y)

    shapes = [
        jax.ShapeDtypeStruct((64, 512), "float32"),
        jax.ShapeDtypeStruct((512, 64), "float32"),
    ]
    text = jax.jit(program).lower(*shapes).compile().as_text()
    found = read_program(text, {})
    assert sum(t.bytes for t in found.traffic) == pytest.approx(found.bytes_accessed)
    assert sum(t.flops for t in found.traffic) == found.flops == 2 * 64 * 512 * 64
    without = sum(t.bytes for t in found.traffic if not t.flops)
    # Seven times at least a read and a write of 64 x 64 float32.
    assert without >= 7 * 2 * 4 * 64 * 64
    (product,) = [t for t in found.traffic if t.flops]
    assert product.bytes == 4 * (2 * 64 * 512 + 64 * 64)


@pytest.mark.parametrize(
    ("topology", "head_dim", "form"),
    [
        ("v3:4x4", 256, "chunked"),
        ("v4:4x4x4", 256, "splash"),
        ("v6e:4x4", 128, "splash"),
        ("v5e:4x4", 64, "chunked"),
        ("A100:8", 256, "chunked"),
        ("A100:8", 128, "cudnn"),
        ("H100:8", 256, "cudnn"),
        ("here", 256, "plain"),
    ],
)
def test_the_form_of_attention_that_devices_can(topology, head_dim, form):
    assert best_attention(find_topology(topology), Attended(head_dim=head_dim)) == form


def test_cudnn_takes_neither_float32_nor_documents():
    h100 = find_topology("H100:8")
    for other in ({"dtype": "float32"}, {"documents": True}):
        assert best_attention(h100, Attended(head_dim=128, **other)) == "chunked"
        with pytest.raises(UsageError, match="--attention cudnn: its kernel is"):
            check_form("cudnn", h100, Attended(head_dim=128, **other))


@pytest.mark.parametrize(
    ("form", "topology", "head_dim"),
    [
        ("splash", "H100:8", 128),
        ("splash", "v3:4x4", 128),
        ("splash", "v5e:4x4", 64),
        ("cudnn", "v5e:4x4", 128),
        ("cudnn", "A100:8", 256),
        ("cudnn", "here", 128),
    ],
)
def test_forms_that_devices_have_not(form, topology, head_dim):
    with pytest.raises(UsageError, match=f"--attention {form}: its kernel is .*: leave it out"):
        check_form(form, find_topology(topology), Attended(head_dim=head_dim))
    for takes_all in ("plain", "chunked"):
        check_form(takes_all, find_topology(topology), Attended(head_dim=head_dim))


def test_no_gpu_pads_a_head_as_wide_as_a_tpus_unit():
    assert prediction._padding(64, "NVIDIA H100 80GB HBM3") == 1
    assert prediction._padding(64, "cpu") == 1
    assert prediction._padding(64, "TPU v3") == 2
    assert prediction._padding(128, "TPU v6 lite") == 2


def test_no_route_where_the_network_is_not_known():
    """Of TPUs here the torus is not looked at, and their hosts have no network in the sheet."""
    v3 = dataclasses.replace(find_topology("v3:2x2"), chips=(), devices_per_host=8)
    assert find_route(("data",), MeshConfig(data=3), v3) is None
    assert find_route(("data",), MeshConfig(data=4), v3) is not None
