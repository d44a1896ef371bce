"""An MLP split into experts, of which a router runs a few for each token (MoEfication, Zhang et al. 2022).

Pure functions of tensors on any device; knows no model. Which neurons belong together is read off their co-activation:

1. A neuron's contribution to a token is |act(gate) * up| (or |act(up)|) times the length of its column of `down`.
2. Two neurons are joined by their contributions' correlation over the calibration tokens, where it is positive: A. None
   is joined to itself.
3. The graph's normalised Laplacian L = I - D^-1/2 A D^-1/2, with D the degrees, has small eigenvalues for cuts that
   sever little. The eigenvectors of the smallest, one row a neuron, rows scaled to length one, place neurons so that
   those that fire together lie together (Ng, Jordan & Weiss 2001; von Luxburg 2007).
4. k-means into clusters of equal size gives the experts.

The router is linear: scores [E] = router @ x. Experts with the largest scores run, unweighted, so that all of them
together are the MLP as it was.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

_LLOYD, _STARTS = 30, 3
_EXACT, _SUBSPACE = 1024, 20  # neurons whose eigenvectors are all computed; steps where they are more
_ROUTER_STEPS, _ROUTER_BATCH, _ROUTER_RATE = 300, 1024, 0.5


@dataclass(eq=False)
class CoActivation:
    """Sums over tokens of the neurons' contributions [T, I], from which their correlations follow; float64."""

    count: int
    total: Tensor
    products: Tensor

    @staticmethod
    def empty(neurons: int, device: torch.device | str = "cpu") -> "CoActivation":
        return CoActivation(
            0,
            torch.zeros(neurons, dtype=torch.float64, device=device),
            torch.zeros((neurons, neurons), dtype=torch.float64, device=device),
        )

    def add(self, contributions: Tensor) -> None:
        self.count += len(contributions)
        values = contributions.double()
        self.total += values.sum(0)
        self.products.addmm_(values.T, values)

    def graph(self) -> Tensor:
        """Affinities A [I, I]: positive correlations of different neurons; one that never varies is joined to none."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        variance = covariance.diagonal()
        scale = torch.where(variance > 1e-12 * variance.mean(), variance.rsqrt(), 0)
        graph: Tensor = (covariance * scale[:, None] * scale).clamp(min=0)
        graph.fill_diagonal_(0)
        return graph


def contributions(hidden: Tensor, down: Tensor) -> Tensor:
    """How much each neuron adds to each token's output: |hidden [T, I]| * ||down [H, I]'s column||."""
    lengths: Tensor = down.norm(dim=0)
    return hidden.abs() * lengths


def laplacian(graph: Tensor) -> Tensor:
    """The normalised Laplacian I - D^-1/2 A D^-1/2 of affinities A [I, I]. A neuron joined to none has eigenvalue 1, so
    that it is no group of its own: a few dozen of them would be all that the smallest eigenvalues tell of."""
    degrees = graph.sum(1)
    scale = torch.where(degrees > 0, degrees.rsqrt(), 0)
    return torch.eye(len(graph), dtype=graph.dtype, device=graph.device) - scale[:, None] * graph * scale


def spectral_embedding(graph: Tensor, dimensions: int) -> Tensor:
    """The eigenvectors of the Laplacian's smallest eigenvalues as points [I, dimensions] of length one."""
    matrix = laplacian(graph)
    few = len(matrix) > max(_EXACT, 2 * dimensions)
    vectors = lowest(matrix, dimensions) if few else torch.linalg.eigh(matrix)[1][:, :dimensions]
    return normalize(vectors, dim=1)


def lowest(matrix: Tensor, count: int) -> Tensor:
    """About the eigenvectors [I, count] of a Laplacian's smallest eigenvalues: those apart from the rest, which tell of
    groups, are found to many digits, and all [I, I] would take ten times longer. Subspace iteration on twice as many
    (Halko, Martinsson & Tropp 2011) with I - L, whose largest they are."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((len(matrix), 2 * count), generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(start).Q
    for _ in range(_SUBSPACE):
        basis = torch.linalg.qr(basis - matrix @ basis).Q
    found: Tensor = basis @ torch.linalg.eigh(basis.T @ matrix @ basis)[1][:, :count]
    return found


def spectral(graph: Tensor, experts: int, seed: int = 0) -> Tensor:
    """The expert [I] of each neuron of a co-activation graph, equally many in each."""
    return balanced_kmeans(spectral_embedding(graph, experts).float(), experts, seed)


def kmeans(rows: Tensor, experts: int, seed: int = 0) -> Tensor:
    """The expert [I] of each neuron by its input weights [I, H] (Zhang et al. 2022), equally many in each."""
    return balanced_kmeans(normalize(rows.float(), dim=1), experts, seed)


def random(neurons: int, experts: int, seed: int = 0) -> Tensor:
    """The expert [I] of each neuron by chance, equally many in each."""
    return torch.randperm(neurons, generator=torch.Generator().manual_seed(seed)) % experts


def neuron_order(labels: Tensor) -> Tensor:
    """The neurons [I], those of expert 0 first; in their old order within an expert."""
    return torch.argsort(labels, stable=True)


def balanced_kmeans(points: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Labels [I] of points [I, d] in clusters of equal size with small squared distances to their centres.

    Lloyd's iterations from k-means++ starts; the best of a few. Assignment: nearest pairs first while a cluster has
    room, then swaps between clusters as long as one helps.
    """
    generator = torch.Generator(device=points.device).manual_seed(seed)
    best, least = torch.empty(0), float("inf")
    for _ in range(_STARTS):
        centres = _plus_plus(points, clusters, generator)
        labels = torch.full((len(points),), -1, device=points.device)
        for _ in range(_LLOYD):
            distances = torch.cdist(points, centres).square()
            found = assign(distances)
            if torch.equal(found, labels):
                break
            labels = found
            centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(clusters)])
        cost = float(torch.cdist(points, centres).square().gather(1, labels[:, None]).sum())
        if cost < least:
            best, least = labels, cost
    return best


def _plus_plus(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Starting centres, each new one likely to be far from the others (Arthur & Vassilvitskii 2007)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator, device=points.device))]
    nearest = torch.full((len(points),), float("inf"), device=points.device)
    while len(chosen) < clusters:
        nearest = nearest.minimum((points - points[chosen[-1]]).square().sum(1))
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def assign(costs: Tensor) -> Tensor:
    """A cluster [I] for each row of costs [I, k], I / k rows to each, at a small sum of costs: no swap of two rows
    lowers it. Every row asks for its cheapest cluster, which turns away those that cost most (Gale & Shapley 1962)."""
    rows, clusters = costs.shape
    wanted = costs.cpu().clone()
    while True:
        least, labels = wanted.min(1)
        order = least.argsort()
        order = order[labels[order].argsort(stable=True)]  # by cluster, the cheapest first
        sizes = labels.bincount(minlength=clusters)
        place = torch.arange(rows) - (sizes.cumsum(0) - sizes)[labels[order]]
        late = order[place >= rows // clusters]
        if not len(late):
            return _swap(costs.cpu(), labels).to(costs.device)
        wanted[late, labels[late]] = torch.inf


def _swap(costs: Tensor, labels: Tensor) -> Tensor:
    """Swap the pair of rows that saves most, until none saves."""
    rows, clusters = costs.shape
    gains = costs.gather(1, labels[:, None]) - costs  # [I, k] of moving a row alone
    floor = 1e-6 * float(costs.abs().mean())
    best = torch.empty(clusters, clusters)
    mover = torch.empty(clusters, clusters, dtype=torch.long)

    def look(cluster: int) -> None:
        members = (labels == cluster).nonzero()[:, 0]
        best[cluster], which = gains[members].max(0)
        mover[cluster] = members[which]

    for cluster in range(clusters):
        look(cluster)
    for _ in range(10 * rows):
        both = (best + best.T).fill_diagonal_(0)
        a, b = divmod(int(both.argmax()), clusters)
        if both[a, b] <= floor:
            break
        for row, cluster in ((int(mover[a, b]), b), (int(mover[b, a]), a)):
            labels[row] = cluster
            gains[row] = costs[row, cluster] - costs[row]
        look(a)
        look(b)
    return labels


def expert_norms(hidden: Tensor, down: Tensor, experts: int) -> Tensor:
    """The length [T, E] of what each expert adds to each token, neurons in the experts' order."""
    parts = zip(hidden.chunk(experts, dim=1), down.chunk(experts, dim=1), strict=True)
    return torch.stack([(part @ columns.T).norm(dim=1) for part, columns in parts], dim=1)


def train_router(x: Tensor, norms: Tensor, seed: int = 0) -> Tensor:
    """Router [E, H] for inputs x [T, H] whose experts add outputs of lengths `norms` [T, E].

    Starts from least squares on each expert's share of the length; then Adam on the cross-entropy with its share of the
    squared length, which is what is lost where it does not run.
    """
    x, norms = x.float(), norms.float()
    moment = x.T @ x
    moment.diagonal().add_(1e-3 * moment.diagonal().mean())
    router = torch.linalg.solve(moment, x.T @ normalize(norms, dim=1)).T
    router = (router / (x @ router.T).std().clamp(min=1e-9)).detach().requires_grad_()
    wanted = normalize(norms.square(), p=1, dim=1)
    optimiser = torch.optim.Adam([router], lr=_ROUTER_RATE / float(x.norm(dim=1).mean().clamp(min=1e-9)))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, _ROUTER_STEPS)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(_ROUTER_STEPS):
            rows = torch.randint(len(x), (_ROUTER_BATCH,), generator=generator).to(x.device)
            loss = -(wanted[rows] * (x[rows] @ router.T).log_softmax(1)).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    trained: Tensor = router.detach()
    return trained


def active_mask(scores: Tensor, active: int, neurons: int) -> Tensor:
    """Which neurons [T, I] run where the experts with the `active` largest scores [T, E] do."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(active, dim=1).indices, True)
    return chosen.repeat_interleave(neurons // scores.shape[1], dim=1)
