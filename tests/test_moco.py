"""MoCo: InfoNCE against the paper's formula, the queue, the key encoder, and what a resumed round needs."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pairs  # noqa: E402

from ticketkit import models  # noqa: E402
from ticketkit.pretrain.moco import Keys, MoCo, info_nce  # noqa: E402

SMALL = MoCo(key_momentum=0.9, queue=20, dim=6, bn_groups=2)


def units(seed: int, count: int, dim: int = 6) -> torch.Tensor:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def begin(objective: MoCo = SMALL, sparsity: float = 0.0) -> tuple[torch.nn.Module, Keys]:
    module, _ = pairs.network(objective, sparsity)
    return module, objective.begin(module)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("count", "negatives"), [(1, 1), (5, 12), (8, 64)])
def test_info_nce_against_the_paper(count: int, negatives: int, temperature: float) -> None:
    """He et al. 2020, eq. 1, query by query in float64."""
    queries, keys, queue = units(0, count), units(1, count), units(2, negatives)
    expected, right = [], 0
    for query, key in zip(queries.numpy(), keys.numpy(), strict=True):
        cosines = np.array([query @ key, *(query @ other for other in queue.numpy())])
        expected.append(-np.log(np.exp(cosines[0] / temperature) / np.exp(cosines / temperature).sum()))
        right += cosines[0] > cosines[1:].max()
    loss, found = info_nce(queries, keys, queue, temperature)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12) and int(found) == right
    without = -np.log(np.mean(np.exp(-np.array(expected))))
    assert count == 1 or abs(loss.item() - without) > 1e-3, "the logarithm of the mean is another loss"
    assert abs(loss.item() - info_nce(queries, keys, -queue, temperature)[0].item()) > 1e-3


def test_a_collapsed_encoder_is_never_right() -> None:
    same = torch.ones(4, 1)
    assert int(info_nce(same, same, same, 0.2)[1]) == 0
    assert int(info_nce(same, same, -same, 0.2)[1]) == 4


def test_the_queue_replaces_the_oldest_and_wraps() -> None:
    """Batches of 7 into 20 rows, no multiple: after each, the rows hold the latest 20 keys, the oldest at the pointer."""
    _, state = begin()
    history = list(state.queue.clone())
    for step in range(8):
        keys = units(step, 7).float()
        state.enqueue(keys)
        history.extend(keys)
        start = int(state.pointer)
        assert start == 7 * (step + 1) % 20
        assert torch.equal(state.queue.roll(-start, 0), torch.stack(history[-20:]))


def test_more_keys_than_the_queue_holds() -> None:
    _, state = begin()
    keys = units(0, 47).float()
    state.enqueue(keys)
    assert torch.equal(state.queue.roll(-int(state.pointer), 0), keys[-20:])


def test_a_key_joins_the_queue_after_its_own_step() -> None:
    module, state = begin()
    views = pairs.rendered(SMALL, pairs.some(8).images, 0)
    before = state.queue.clone()
    torch.manual_seed(1)
    loss, right = SMALL.loss(module, state, views, torch.zeros(8))
    keys = state.queue[:8]
    queries = torch.nn.functional.normalize(module(views[0]), dim=1)
    expected, expected_right = info_nce(queries, keys, before, 0.2)
    torch.testing.assert_close(loss, expected)
    assert int(right) == int(expected_right)
    assert info_nce(queries, keys, state.queue, 0.2)[0] > expected + 0.1, "with the positive among the negatives it would be another"
    assert torch.equal(state.queue[8:], before[8:]) and not torch.equal(state.queue[:8], before[:8])


def test_keys_are_of_length_one_and_belong_to_their_images() -> None:
    """The batch is shuffled into groups of its own statistics and put back in order; in evaluation mode that changes nothing."""
    _, state = begin()
    views = pairs.rendered(SMALL, pairs.some(9).images, 0)[1]
    torch.testing.assert_close(state(views).norm(dim=1), torch.ones(9))
    state.eval()
    expected = torch.nn.functional.normalize(state.encoder(views), dim=1)
    torch.testing.assert_close(state(views), expected)
    assert (expected - expected.roll(1, 0)).abs().amax(1).min() > 1e-4, "neighbours differ, so order shows"


@pytest.mark.parametrize(("batch", "groups", "expected"), [(9, 2, [5, 4]), (9, 1, [9]), (5, 8, [3, 2]), (3, 8, [3]), (64, 8, [8] * 8)])
def test_statistics_are_those_of_groups_of_a_random_permutation(batch: int, groups: int, expected: list[int]) -> None:
    _, state = begin(MoCo(queue=20, dim=6, bn_groups=groups))
    seen: list[torch.Tensor] = []
    state.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    numbered = torch.arange(batch).float()[:, None, None, None].expand(batch, 3, 16, 16)
    for _ in range(2):
        state(numbered)
    half = len(expected)
    assert [len(part) for part in seen] == 2 * expected
    first, second = (torch.cat(part)[:, 0, 0, 0] for part in (seen[:half], seen[half:]))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(batch))
    assert not torch.equal(first, second), "another permutation each time"


def test_the_key_encoder_follows_the_weights_but_not_the_statistics() -> None:
    module, state = begin()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter))
    module.bn1.running_mean.fill_(5.0)
    before = {name: p.clone() for name, p in state.encoder.named_parameters()}
    statistics = {name: b.clone() for name, b in state.encoder.named_buffers()}
    SMALL.after_step(module, state)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(state.encoder.get_parameter(name), 0.9 * before[name] + 0.1 * parameter, rtol=1e-6, atol=1e-7)
        assert not torch.equal(state.encoder.get_parameter(name), before[name])
    assert all(torch.equal(b, statistics[name]) for name, b in state.encoder.named_buffers())
    state(pairs.rendered(SMALL, pairs.some(8).images, 0)[1])
    assert not torch.equal(state.encoder.bn1.running_mean, statistics["bn1.running_mean"]), "it keeps statistics of its own"


def test_no_gradient_reaches_the_key_encoder_or_the_queue() -> None:
    module, state = begin()
    loss, _ = SMALL.loss(module, state, pairs.rendered(SMALL, pairs.some(8).images, 0), torch.zeros(8))
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in state.parameters()) and not state.queue.requires_grad
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in module.named_parameters() if "conv" in name)


def test_the_mask_holds_in_both_encoders() -> None:
    module, masks = pairs.network(SMALL, 0.7)
    state, _ = pairs.train(SMALL, module, masks, 5, batch=8)
    for name, mask in masks.items():
        ours, theirs = module.get_parameter(name), state.encoder.get_parameter(name)
        assert 0.6 < (~mask).float().mean() < 0.8
        assert (ours[~mask] == 0).all() and (theirs[~mask] == 0).all()
        assert (ours[mask] != 0).all() and (theirs[mask] != 0).all() and not torch.equal(ours, theirs)
    dense, _ = pairs.network(SMALL)
    astray = SMALL.begin(dense)  # negative control: made before the mask, it does not hold
    SMALL.after_step(module, astray)
    assert any((astray.encoder.get_parameter(name)[~mask] != 0).any() for name, mask in masks.items())


def test_a_round_begins_with_a_new_queue_that_the_seed_decides() -> None:
    """Rewinding: after training, `begin` on the rewound network and seed gives what the first round had."""
    module, masks = pairs.network(SMALL)
    start = models.arrays(module)
    torch.manual_seed(0)
    first = models.arrays(SMALL.begin(module))
    state, _ = pairs.train(SMALL, module, masks, 3, batch=8)
    trained = models.arrays(state)
    models.assign(module, start)
    torch.manual_seed(0)
    again = models.arrays(SMALL.begin(module))
    assert first.keys() == again.keys() == trained.keys() >= {"queue", "pointer", "encoder.conv1.weight", "encoder.fc.2.bias"}
    for name, values in first.items():
        np.testing.assert_array_equal(again[name], values)
    assert (trained["queue"] != first["queue"]).any() and trained["pointer"] == 24 % 20 and first["pointer"] == 0
    np.testing.assert_allclose(np.linalg.norm(first["queue"], axis=1), 1, rtol=1e-5)
    torch.manual_seed(1)
    assert (models.arrays(SMALL.begin(module))["queue"] != first["queue"]).all()


def test_the_state_dict_and_the_generator_are_all_that_a_resumed_round_needs() -> None:
    module, state = begin(sparsity=0.5)
    views = [pairs.rendered(SMALL, pairs.some(8).images, step) for step in range(3)]
    SMALL.loss(module, state, views[0], torch.zeros(8))
    saved = models.arrays(module), models.arrays(state), torch.get_rng_state()
    expected = [SMALL.loss(module, state, view, torch.zeros(8))[0].item() for view in views[1:]]
    other, fresh = begin()
    models.assign(other, saved[0])
    models.assign(fresh, saved[1])
    torch.set_rng_state(saved[2])
    assert [SMALL.loss(other, fresh, view, torch.zeros(8))[0].item() for view in views[1:]] == expected
    models.assign(fresh, saved[1])
    assert [SMALL.loss(other, fresh, view, torch.zeros(8))[0].item() for view in views[1:]] != expected, "another permutation"
