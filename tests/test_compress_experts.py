"""Experts: the Laplacian knows a graph's parts, clusters are equal and cheap, planted groups are found, all experts
together are the MLP."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from hasten.compress import experts  # noqa: E402
from hasten.compress.experts import CoActivation  # noqa: E402


def planted(seed: int = 0, tokens: int = 1500, topics: int = 4, width: int = 12, hidden: int = 24):
    """A gated MLP whose neurons belong to topics, shuffled, and inputs of one topic each: x, gate, up, down, topics."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0][:topics]
    about = torch.randint(topics, (tokens,), generator=generator)
    x = 3 * directions[about] + 0.7 * torch.randn(tokens, hidden, generator=generator)
    topic_of = torch.arange(topics).repeat_interleave(width)[torch.randperm(topics * width, generator=generator)]
    gate = 1.5 * directions[topic_of] + 0.15 * torch.randn(topics * width, hidden, generator=generator)
    up = torch.randn(topics * width, hidden, generator=generator) / hidden**0.5
    down = torch.randn(hidden, topics * width, generator=generator)
    return x, gate, up, down, topic_of


def hidden_of(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)


def graph_of(hidden: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    seen = CoActivation.empty(hidden.shape[1])
    for part in hidden.split(400):
        seen.add(experts.contributions(part, down))
    return seen.graph()


def lost(x, hidden, down, labels, num, active) -> float:
    """Share of the squared output that is lost on the second half of the tokens, router trained on the first."""
    order = experts.neuron_order(labels)
    hidden, down = hidden[:, order], down[:, order]
    half = len(x) // 2
    router = experts.train_router(x[:half], experts.expert_norms(hidden[:half], down, num))
    mask = experts.active_mask(x[half:] @ router.T, active, hidden.shape[1])
    y = hidden[half:] @ down.T
    return float(((hidden[half:] * mask) @ down.T - y).square().sum() / y.square().sum())


def test_zero_eigenvalues_count_the_parts_of_a_graph() -> None:
    """von Luxburg 2007, proposition 4: the multiplicity of 0 is the number of connected components, and the
    eigenvectors place each component at a point of its own."""
    graph = torch.zeros(9, 9, dtype=torch.float64)
    for part in (range(4), range(4, 6), range(6, 9)):
        for i, j in itertools.product(part, part):
            graph[i, j] = 1 if i == j else 0.3
    values = torch.linalg.eigvalsh(experts.laplacian(graph))
    assert (values.abs() < 1e-12).sum() == 3
    assert values[3] > 0.1
    assert values.max() <= 2
    points = experts.spectral_embedding(graph, 3)
    alike = points @ points.T
    torch.testing.assert_close(alike, (graph > 0).double())


def test_a_few_eigenvectors_are_those_among_all() -> None:
    group = torch.randperm(300, generator=torch.Generator().manual_seed(0)) % 6
    noise = torch.rand(300, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = experts.laplacian((noise + noise.T) * torch.where(group[:, None] == group, 1.0, 0.4).fill_diagonal_(0))
    every = torch.linalg.eigh(matrix)[1][:, :6]
    few = experts.lowest(matrix, 6)
    torch.testing.assert_close(few.T @ few, torch.eye(6).double())
    assert torch.linalg.svdvals(every.T @ few).min() > 1 - 1e-6


def test_correlations_are_summed_over_batches() -> None:
    x, gate, up, down, _ = planted()
    values = experts.contributions(hidden_of(x, gate, up), down).double()
    want = torch.corrcoef(values.T).clamp(min=0).fill_diagonal_(0)
    torch.testing.assert_close(graph_of(hidden_of(x, gate, up), down), want)


def test_a_neuron_that_never_fires_is_joined_to_none() -> None:
    hidden = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    hidden[:, 2] = 0
    graph = graph_of(hidden, torch.ones(3, 6))
    assert not graph[2].any()
    assert torch.isfinite(experts.spectral_embedding(graph, 3)).all()


def test_neurons_that_never_fire_do_not_hide_the_groups_of_the_others() -> None:
    x, gate, up, down, topics = planted()
    hidden = hidden_of(x, gate, up)
    idle = torch.cat([(topics == topic).nonzero()[:2, 0] for topic in range(4)])
    hidden[:, idle] = 0
    labels = experts.spectral(graph_of(hidden, down), 4)
    fires = torch.ones(len(topics), dtype=torch.bool)
    fires[idle] = False
    for topic in range(4):
        assert len(labels[fires & (topics == topic)].unique()) == 1, topic


def test_assignments_are_balanced_and_near_the_best() -> None:
    """Against every balanced assignment of eight rows to four clusters."""
    best, found, slots = 0.0, 0.0, [0, 0, 1, 1, 2, 2, 3, 3]
    every = torch.tensor(sorted(set(itertools.permutations(slots))))
    for seed in range(20):
        costs = torch.rand(8, 4, generator=torch.Generator().manual_seed(seed))
        labels = experts.assign(costs)
        assert labels.bincount().tolist() == [2, 2, 2, 2]
        found += float(costs.gather(1, labels[:, None]).sum())
        best += float(costs[torch.arange(8), every].sum(1).min())
    assert best <= found < 1.15 * best


def test_balanced_kmeans_finds_clusters_of_equal_size() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(5).repeat_interleave(8)[torch.randperm(40, generator=generator)]
    points = 4 * torch.randn(5, 3, generator=generator)[truth] + 0.2 * torch.randn(40, 3, generator=generator)
    labels = experts.balanced_kmeans(points, 5)
    assert len({(int(a), int(b)) for a, b in zip(labels, truth, strict=True)}) == 5
    assert torch.equal(labels, experts.balanced_kmeans(points, 5))


def test_planted_topics_are_found_and_spectral_beats_random() -> None:
    x, gate, up, down, topic_of = planted()
    hidden = hidden_of(x, gate, up)
    labels = experts.spectral(graph_of(hidden, down), 4)
    assert len({(int(a), int(b)) for a, b in zip(labels, topic_of, strict=True)}) == 4
    losses = {
        "spectral": lost(x, hidden, down, labels, 4, 1),
        "kmeans": lost(x, hidden, down, experts.kmeans(gate, 4), 4, 1),
        "random": lost(x, hidden, down, experts.random(48, 4), 4, 1),
    }
    assert losses["spectral"] < 0.1
    assert losses["spectral"] <= losses["kmeans"] + 1e-6
    assert losses["spectral"] < 0.3 * losses["random"]


def test_all_experts_are_the_dense_mlp() -> None:
    x, gate, up, down, _ = planted()
    hidden = hidden_of(x, gate, up)
    assert lost(x, hidden, down, experts.random(48, 4), 4, 4) == 0
    order = experts.neuron_order(experts.random(48, 4, seed=3))
    found = hidden_of(x, gate[order], up[order]) @ down[:, order].T
    torch.testing.assert_close(found, hidden @ down.T, atol=1e-4, rtol=1e-4)


def test_the_router_is_near_the_choice_that_sees_the_outputs() -> None:
    x, gate, up, down, _ = planted()
    hidden = hidden_of(x, gate, up)
    order = experts.neuron_order(experts.spectral(graph_of(hidden, down), 4))
    norms = experts.expert_norms(hidden[:, order], down[:, order], 4)
    router = experts.train_router(x[:1000], norms[:1000])
    chosen, best = (x[1000:] @ router.T).argmax(1), norms[1000:].argmax(1)
    assert float((chosen == best).double().mean()) > 0.95
