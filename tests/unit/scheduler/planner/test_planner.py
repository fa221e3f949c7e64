"""Whatever the model and the cluster: plans fit, and more memory never makes one impossible."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.planner.candidates import candidates, pipelines
from scheduler.planner.choose import choose
from scheduler.planner.memory import rank_memory
from scheduler.planner.reasons import reasons
from scheduler.planner.refusal import refusal
from scheduler.planner.runs import even_runs
from scheduler.planner.shape import Axes, ClusterShape, LayerShape, ModelShape, NodeShape, Wishes

SIZES = st.integers(1, 200)
AXIS = st.one_of(st.none(), st.none(), st.integers(1, 4))


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    experts = draw(st.sampled_from([0, 0, 4, 8, 12]))
    heads = draw(st.sampled_from([1, 3, 4, 8, 12]))
    layers = tuple(
        LayerShape(
            whole_bytes=draw(SIZES),
            divided_bytes=draw(SIZES),
            expert_bytes=draw(SIZES) if experts else 0,
            cost=draw(SIZES),
        )
        for _ in range(draw(st.integers(1, 6)))
    )
    latent = draw(st.booleans())
    return ModelShape(
        name="m",
        layers=layers,
        embedding_bytes=draw(SIZES),
        head_bytes=draw(SIZES),
        packed_head_bytes=draw(SIZES),
        tied=draw(st.booleans()),
        num_heads=heads,
        num_kv_heads=heads,
        tensor_sizes=tuple(size for size in range(1, heads + 1) if heads % size == 0),
        num_experts=experts,
        cache_whole_bytes=2 if latent else 0,
        cache_divided_bytes=0 if latent else 2 * heads,
        most_stages=len(layers),
    )


@st.composite
def clusters(draw: st.DrawFn) -> ClusterShape:
    memory = draw(st.integers(100, 20_000))
    nodes = tuple(
        NodeShape(ranks=draw(st.integers(1, 6)), memory_bytes=memory, free_bytes=memory - draw(st.integers(0, 50)))
        for _ in range(draw(st.integers(1, 4)))
    )
    return ClusterShape(
        nodes=nodes,
        shared_memory=draw(st.booleans()),
        cache_share=draw(st.sampled_from([0.5, 0.9])),
        reserve_bytes=draw(st.integers(0, 50)),
        fast_links=draw(st.booleans()),
    )


@st.composite
def wishes(draw: st.DrawFn) -> Wishes:
    return Wishes(
        max_model_len=draw(st.integers(1, 300)),
        max_batch_size=draw(st.integers(1, 16)),
        block_size=draw(st.sampled_from([1, 16])),
        deterministic=draw(st.booleans()),
        cache_bytes=draw(st.one_of(st.none(), st.integers(1, 5000))),
        data=draw(AXIS),
        pipeline=draw(AXIS),
        tensor=draw(st.none()),
        redundant_experts=draw(st.sampled_from([None, None, 0, 4])),
    )


def more(cluster: ClusterShape, extra: int) -> ClusterShape:
    nodes = tuple(
        replace(node, memory_bytes=node.memory_bytes + extra, free_bytes=node.free_bytes + extra)
        for node in cluster.nodes
    )
    return replace(cluster, nodes=nodes)


@settings(max_examples=300, deadline=None)
@given(models(), clusters(), wishes(), st.integers(0, 5000))
def test_plans_fit_and_more_memory_forbids_nothing(
    model: ModelShape, cluster: ClusterShape, asked: Wishes, extra: int
) -> None:
    planned = choose(model, cluster, asked)
    if planned is None:
        assert len(refusal(model, cluster, asked)) > 20
        return
    axes, memory = planned.axes, rank_memory(model, cluster, asked, planned.axes)
    assert memory == planned.memory
    assert memory.left_bytes >= 0
    assert memory.weight_bytes + memory.reserve_bytes + memory.cache_bytes <= memory.memory_bytes
    assert memory.cache_tokens >= asked.sequence_tokens
    assert axes.tensor in model.tensor_sizes
    assert axes.tensor <= max(cluster.largest, 1)
    assert not (asked.deterministic and axes.tensor > 2)
    assert axes.pipeline <= model.most_stages or asked.pipeline is not None
    for axis in ("data", "pipeline", "redundant_experts"):
        assert getattr(asked, axis) in (None, getattr(axes, axis))
    if not cluster.shared_memory:
        assert axes.num_ranks <= cluster.num_places
    if axes.redundant_experts:
        assert axes.data > 1
        assert (model.num_experts + axes.redundant_experts) % axes.expert == 0
    assert reasons(model, cluster, asked, planned)
    assert choose(model, more(cluster, extra), asked) is not None


@settings(max_examples=200, deadline=None)
@given(models(), clusters(), wishes())
def test_nothing_is_refused_that_would_fit(model: ModelShape, cluster: ClusterShape, asked: Wishes) -> None:
    """Against trying all candidates, which is what the planner leaves out where it stops early."""
    fitting = [
        axes
        for pipeline in pipelines(model, cluster, asked)
        for axes in candidates(model, cluster, asked, pipeline)
        if (memory := rank_memory(model, cluster, asked, axes)).cache_tokens >= asked.sequence_tokens
        and memory.cache_bytes > 0
    ]
    assert (choose(model, cluster, asked) is not None) == bool(fitting)


def _plain(**changes: object) -> ModelShape:
    model = ModelShape(
        name="m",
        layers=(LayerShape(whole_bytes=0, divided_bytes=100, cost=1),) * 4,
        embedding_bytes=0,
        head_bytes=0,
        num_heads=4,
        num_kv_heads=4,
        tensor_sizes=(1, 2, 4),
        cache_divided_bytes=4,
        most_stages=4,
    )
    return replace(model, **changes)  # type: ignore[arg-type]


def test_tensor_is_as_small_as_fits_and_data_takes_the_rest() -> None:
    asked = Wishes(max_model_len=16, max_batch_size=1)
    for memory, expected in ((1000, Axes(data=4)), (400, Axes(data=2, tensor=2)), (200, Axes(tensor=4))):
        cluster = ClusterShape(
            nodes=(NodeShape(ranks=4, memory_bytes=memory, free_bytes=memory),), shared_memory=False, cache_share=1.0
        )
        planned = choose(_plain(), cluster, asked)
        assert planned is not None
        assert planned.axes == expected


def test_runs_are_even() -> None:
    assert even_runs((1, 1, 1, 3), 2) == (range(3), range(3, 4))
    assert [len(run) for run in even_runs((1,) * 61, 4)] in ([15, 15, 15, 16], [16, 15, 15, 15])
