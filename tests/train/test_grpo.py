"""GRPO: the loss of packs, the loop, what it refuses, and how killed runs go on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import heavy  # noqa: F401
import numpy as np
import pytest
import torch
from cli_run import vrthinker
from command_worker import at, command
from forks import Outcomes
from grpo_runs import SIZE, episodes, metrics, values
from grpo_runs import world as world
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.data.pairs import load_pairs
from vrthinker.engine.hf.checkpoint import resolve_checkpoint
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.trajectory import Trajectory, load_trajectories
from vrthinker.errors import InputError
from vrthinker.policy.batches import FrameLoader
from vrthinker.policy.packed_forward import packed_logprobs
from vrthinker.policy.packing import Pack
from vrthinker.reward.advantages import advantages
from vrthinker.reward.scoring import GroupRewards
from vrthinker.reward.settings import DrGrpoAdvantage, GrpoAdvantage
from vrthinker.train.grpo import run_grpo
from vrthinker.train.grpo_batch import Batch, PackedEpisodes, pack_batch, packed_loss
from vrthinker.train.grpo_settings import LossSettings, grpo_settings, resume_settings
from vrthinker.train.rollouts import Group
from vrthinker.train.settings import load_recipe
from vrthinker.train.trials import Trial
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.world.files import PAIRS_FILE


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grpo") / "run"
    assert run_grpo(grpo_settings(values(world)), out) == out / "model"
    return out


# The run


def test_a_run_learns_from_its_own_episodes_and_says_what_they_were(run: Path) -> None:
    found = episodes(run)
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in found:
        groups.setdefault(trajectory.id.split("#")[0], []).append(trajectory)
        assert trajectory.settings.temperature == 1.5
        assert not trajectory.settings.guided
        assert all(record.token_ids and record.logprobs for record in trajectory.rounds)
    assert {len(members) for members in groups.values()} == {SIZE}
    for members in groups.values():
        assert len({member.videos for member in members}) == 1, "one order of the clips"
        assert len({member.seed for member in members}) == SIZE
    assert {trajectory.policy_version for trajectory in found} == {0, 2}, "refreshed after 2 steps"
    lines = metrics(run)
    assert len(lines) == 3
    refreshed = [line for line in lines if "rollouts/groups_drawn" in line]
    assert [line["step"] for line in refreshed] == [1, 3]
    for line, number in zip(refreshed, (0, 1), strict=True):
        folder = run / "rollouts" / f"refresh-{number:05d}"
        record = json.loads((folder / "refresh.json").read_text())
        sampled = [
            t for file in sorted(folder.glob("draw-*/episodes.jsonl")) for t in load_trajectories(file)
        ]
        assert record["drawn"] == line["rollouts/groups_drawn"] == len(sampled) / SIZE
        assert len(record["kept"]) == line["rollouts/groups_kept"] > 0
        calls = sum(trajectory.tool_calls for trajectory in sampled) / len(sampled)
        assert line["rollouts/tool_calls"] == pytest.approx(calls)
        rewards = [r for of in record["rewards"].values() for r in of["total"] if r is not None]
        assert line["reward/total"] == pytest.approx(sum(rewards) / len(rewards))
    for line in lines:
        assert line["drift/mean"] < 1e-5, "the training forward computes what the sampler did"
        assert line["policy/entropy"] > 0
        assert line["ratio/mean"] == pytest.approx(1.0, abs=0.2)
        assert line["batch/episodes"] in (2 * SIZE, SIZE)
    assert [line["ratio/max"] for line in refreshed] == [1.0, 1.0], "the policy is the old policy"
    assert lines[1]["ratio/max"] != 1.0
    assert lines[0]["kl/ref"] == pytest.approx(0.0, abs=1e-9), "the reference is where it starts"
    assert lines[2]["kl/ref"] > 0
    base = resolve_checkpoint("nano") / "model.safetensors"
    assert (run / "model" / "model.safetensors").read_bytes() != base.read_bytes()


def test_a_finished_run_is_found_finished(run: Path) -> None:
    before = (run / "model" / "model.safetensors").read_bytes()
    assert run_grpo(resume_settings(run), run) == run / "model"
    assert (run / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.multi_process
def test_killed_anywhere_a_run_ends_in_the_same_bits(
    world: Path, run: Path, commands: Outcomes, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values(world)))
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    first = ("train", "grpo", "--recipe", recipe, "--out")
    (wanted,) = commands([command(*first, straight)])
    assert wanted["result"] == 0, wanted
    moments = [
        at("vrthinker.judge_file:append_trajectory", 2, "SIGKILL", after=True),
        at("vrthinker.records.verdict_log:VerdictLog.append", 3, "SIGKILL"),
        at("vrthinker.train.rollouts:replace_file", 1, "SIGKILL"),
        at("vrthinker.train.grpo:advantages", 1, "SIGKILL"),
        at("vrthinker.train.grpo_logprobs:packed_logprobs", 2, "SIGKILL"),
        at("vrthinker.train.grpo_logprobs:replace_file", 1, "SIGKILL", after=True),
        at("torch:Tensor.backward", 1, "SIGKILL"),
        at("vrthinker.train.loop.loop:save_checkpoint", 1, "SIGKILL", after=True),
        at("torch:Tensor.backward", 2, "SIGKILL", after=True),
        at("transformers:PreTrainedModel.save_pretrained", 1, "SIGKILL", after=True),
    ]
    resume = ("train", "grpo", "--resume", broken)
    jobs = [command(*first, broken, moments=moments[:1])]
    jobs += [command(*resume, moments=[moment]) for moment in moments[1:]]
    *killed, done = commands([*jobs, command(*resume)])
    assert [outcome["code"] for outcome in killed] == [-9] * len(moments), killed
    assert done["result"] == 0, done
    weights = [folder / "model" / "model.safetensors" for folder in (straight, broken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    ids = [[t.id for t in episodes(folder)] for folder in (straight, broken)]
    assert sorted(set(ids[0])) == sorted(set(ids[1]))


def test_it_ends_at_the_limit_of_the_kl_and_stays_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = grpo_settings(values(world, loss={"most_kl": 1e-12}))
    assert run_grpo(settings, out) == out / "model"
    assert metrics(out)[-1]["step"] == 2, "the first step is at the reference itself"
    assert (
        "is above most_kl 1e-12 after step 2; what was learned until here is kept" in capsys.readouterr().err
    )
    before = (out / "model" / "model.safetensors").read_bytes()
    assert run_grpo(resume_settings(out), out) == out / "model"
    assert metrics(out)[-1]["step"] == 2
    assert (out / "model" / "model.safetensors").read_bytes() == before


def test_without_a_reference_under_evict_by_another_advantage(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_checkpoint("nano"), base)
    stored = json.loads((base / "vrthinker.json").read_text())
    stored["episode"]["memory"] = "evict"
    (base / "vrthinker.json").write_text(json.dumps(stored))
    more = {"loss": {"kl_weight": 0.0, "aggregation": "token_mean"}, "advantage": {"kind": "rloo"}}
    more["learn"] = {**values(world)["learn"], "steps": 1}
    out = tmp_path / "run"
    assert run_grpo(grpo_settings(values(world, model=str(base), **more)), out) == out / "model"
    (line,) = metrics(out)
    assert "kl/ref" not in line
    assert line["drift/mean"] < 1e-5
    assert {t.settings.memory for t in episodes(out)} == {"evict"}


# Packs and the loss


def telling(run: Path, sizes: Sequence[int]) -> list[Group]:
    """Groups of recorded episodes, with rewards of the test's own; one episode of the first has failed."""
    found, groups = episodes(run), []
    rng = np.random.default_rng(3)
    for number, size in enumerate(sizes):
        # Two groups are about one pair, and so have one caption.
        members = [found[(3 * (number // 2) + place) % len(found)] for place in range(size)]
        totals: list[float | None] = [float(value) for value in rng.normal(size=size)]
        if number == 0:
            totals[1] = None
        rewards = GroupRewards(tuple(totals), {}, tuple(totals), {})
        groups.append(Group(f"group {number}", cast("tuple[Trial, ...]", ()), tuple(members), rewards))
    return groups


@pytest.mark.parametrize("aggregation", ["episode_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("max_tokens", [None, 700])
def test_the_loss_is_that_of_a_slow_loop_over_episodes(
    aggregation: str, max_tokens: int | None, run: Path
) -> None:
    """In float64, episode by episode and token by token, for groups of 8, 7, 1 and 4, packed and split."""
    fixed = 50 if aggregation == "fixed_length" else None
    settings = LossSettings.model_validate(
        {"aggregation": aggregation, "fixed_length": fixed, "clip_high": 0.3, "kl_weight": 0.05}
    )
    groups = telling(run, (8, 7, 1, 4))
    folder = resolve_checkpoint("nano")
    policy = VisionLanguageModel(folder, device=torch.device("cpu"), dtype=torch.float32)
    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    compared = advantages(GrpoAdvantage(), {group.id: group.rewards.totals for group in groups})
    batch = pack_batch(groups, compared, markup, (28, 28), memory="rerender", max_tokens=max_tokens)
    if max_tokens is not None:
        assert len(batch.packs) > len(groups), "groups are split"

    # Log-probabilities of the test's own, the same for a token wherever it was packed.
    generator = torch.Generator().manual_seed(1)
    own = {}
    for group in groups:
        for place, trajectory in enumerate(group.trajectories):
            assert trajectory is not None
            length = sum(len(record.token_ids or ()) for record in trajectory.rounds)
            own[group.id, place] = -2 * torch.rand(3, length, generator=generator, dtype=torch.float64)
            own[group.id, place][1:] = own[group.id, place][:1] + 0.3 * torch.randn(
                2, length, generator=generator, dtype=torch.float64
            )
    members = [
        (group.id, place)
        for group in groups
        for place, total in enumerate(group.rewards.totals)
        if total is not None
    ]
    used = dict.fromkeys(members, 0)
    total, slopes = 0.0, {member: [] for member in members}  # type: ignore[var-annotated]
    of_pack = iter_members(groups, batch)
    for packed, names in zip(batch.packs, of_pack, strict=True):
        parts = []
        for name, sampled in zip(names, packed.pack.sampled, strict=True):
            parts.append(own[name][:, used[name] : used[name] + len(sampled)].float())
            used[name] += len(sampled)
        logprobs = [part[0].clone().requires_grad_() for part in parts]
        old, ref = (torch.cat([part[row] for part in parts]) for row in (1, 2))
        loss, _, _ = packed_loss(settings, packed, batch, logprobs, old, ref)
        loss.backward()
        total += float(loss.detach())
        for name, part in zip(names, logprobs, strict=True):
            assert part.grad is not None
            slopes[name] += part.grad.tolist()
    assert used == {name: own[name].shape[1] for name in members}, "every token once"

    wanted, wanted_slopes = slow_loss(settings, groups, own)
    assert total == pytest.approx(wanted, rel=1e-5)
    for name in members:
        np.testing.assert_allclose(slopes[name], wanted_slopes[name], rtol=2e-4, atol=1e-9)


def iter_members(groups: Sequence[Group], batch: Batch) -> list[list[tuple[str, int]]]:
    """The episodes of each pack: packs come group by group, and number the valid episodes of their group."""
    names = []
    left = list(groups)
    valid: list[tuple[str, int]] = []
    seen: set[int] = set()
    done = 0
    for packed in batch.packs:
        if done == 0:
            group = left.pop(0)
            valid = [(group.id, place) for place, r in enumerate(group.rewards.totals) if r is not None]
            seen = set()
            done = sum(
                len(record.token_ids or ())
                for _, place in valid
                for record in cast(Trajectory, group.trajectories[place]).rounds
            )
        seen.update(packed.pack.trajectories)
        done -= sum(map(len, packed.pack.sampled))
        names.append([valid[number] for number in packed.pack.trajectories])
    assert done == 0
    assert not left
    return names


def slow_loss(
    settings: LossSettings, groups: Sequence[Group], own: Mapping[tuple[str, int], torch.Tensor]
) -> tuple[float, dict[tuple[str, int], list[float]]]:
    """The equations, one token after the other, in double precision."""
    rows, every = [], []
    for group in groups:
        valid = [total for total in group.rewards.totals if total is not None]
        mean = math.fsum(valid) / len(valid)
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in valid) / max(1, len(valid) - 1))
        for place, reward in enumerate(group.rewards.totals):
            if reward is not None:
                advantage = (reward - mean) / (deviation + 1e-6) if len(valid) > 1 else 0.0
                rows.append(((group.id, place), advantage))
                every.append(own[group.id, place].shape[1])
    total, slopes = 0.0, {}
    for (name, advantage), length in zip(rows, every, strict=True):
        weight = {
            "episode_mean": 1 / (len(rows) * length),
            "token_mean": 1 / sum(every),
            "fixed_length": 1 / (len(rows) * (settings.fixed_length or 1)),
        }[settings.aggregation]
        slopes[name] = []
        for policy, old, ref in own[name].T.tolist():
            ratio = math.exp(policy - old)
            clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            k3 = math.exp(ref - policy) - (ref - policy) - 1
            total += weight * (-min(ratio * advantage, clipped * advantage) + settings.kl_weight * k3)
            moves = ratio * advantage <= clipped * advantage
            slope = -ratio * advantage if moves else 0.0
            slopes[name].append(weight * (slope + settings.kl_weight * (1 - math.exp(ref - policy))))
    return total, slopes


def test_with_constant_rewards_the_gradient_is_that_of_the_kl_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, old, ref = (-torch.rand(40, generator=generator) for _ in range(3))
    settings = LossSettings(kl_weight=0.25)
    rewards = {"one": (0.5,) * 4, "two": (1.25, None)}
    compared = advantages(DrGrpoAdvantage(), rewards)
    assert compared.values == {"one": (0.0,) * 4, "two": (0.0, None)}
    assert (compared.dead, compared.short) == ({"one", "two"}, {"two"})
    packed = PackedEpisodes(cast(Pack, None), compared.values["one"], (10,) * 4, old)  # type: ignore[arg-type]
    batch = Batch([packed], 4, 40)
    logprobs = [part.clone().requires_grad_() for part in policy.split(10)]
    loss, sums, _ = packed_loss(settings, packed, batch, logprobs, old, ref)
    loss.backward()
    again = policy.clone().requires_grad_()
    k3 = (ref - again).exp() - (ref - again) - 1
    (0.25 * k3.view(4, 10).mean(1).mean()).backward()
    assert again.grad is not None
    found = torch.cat([cast(torch.Tensor, part.grad) for part in logprobs])
    torch.testing.assert_close(found, again.grad, rtol=1e-5, atol=1e-9)
    assert float(sums["kl/ref"]) == pytest.approx(float(k3.detach().mean()), rel=1e-5)


@given(cap=st.sampled_from([None, 1.0, 1.5]), seed=st.integers(0, 1000))
def test_importance_weights_are_those_of_old_to_sampler_up_to_the_cap(cap: float | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, old, sampler = (-torch.rand(12, generator=generator, dtype=torch.float64) for _ in range(3))
    settings = LossSettings(kl_weight=0.0, importance_cap=cap)
    packed = PackedEpisodes(cast(Pack, None), (1.0, -2.0), (6, 6), sampler.float())
    batch = Batch([packed], 2, 12)
    parts = [part.clone().requires_grad_() for part in policy.float().split(6)]
    loss, _, _ = packed_loss(settings, packed, batch, parts, old.float(), None)
    wanted = 0.0
    for place in range(12):
        advantage = 1.0 if place < 6 else -2.0
        if cap is not None:
            advantage *= min(cap, math.exp(float(old[place] - sampler[place])))
        ratio = math.exp(float(policy[place] - old[place]))
        wanted -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) / 12
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_old_policy_is_the_sampler(run: Path) -> None:
    """What is recorded beside the tokens is what the packed forward computes for them."""
    policy = VisionLanguageModel(resolve_checkpoint("nano"), device=torch.device("cpu"), dtype=torch.float32)
    markup = Markup(policy.tokenizer, policy.vocabulary_size)
    first = [t for t in episodes(run) if t.policy_version == 0][:SIZE]
    rewards = GroupRewards((1.0, 0.0, 0.5), {}, (1.0, 0.0, 0.5), {})
    group = Group("g", cast("tuple[Trial, ...]", ()), tuple(first), rewards)
    compared = advantages(GrpoAdvantage(), {"g": rewards.totals})
    batch = pack_batch([group], compared, markup, (28, 28), memory="rerender", max_tokens=900)
    loader = FrameLoader(open_reader(), FrameCache(1 << 26))
    banned = markup.vocabulary(policy.device).banned
    for packed in batch.packs:
        with torch.no_grad():
            found = torch.cat(
                packed_logprobs(policy, packed.pack, loader.load, temperature=1.5, banned=banned)
            )
        torch.testing.assert_close(found, packed.sampler, rtol=1e-4, atol=1e-4)
    loader.close()
    with pytest.raises(InputError, match="memory: got 'rerender', allowed in this run: 'evict'"):
        pack_batch([group], compared, markup, (28, 28), memory="evict", max_tokens=None)


# Refusals


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--pairs: missing"),
        (["--pairs", "PAIRS"], "--model: missing"),
        (["--pairs", "PAIRS", "--model", "nano"], "--steps: missing"),
        (["--pairs", "NONE", "--model", "nano", "--steps", "1"], "none.jsonl: not a file"),
        (["--pairs", "PAIRS", "--model", "nano", "--steps", "0"], "--steps: got 0, allowed: at least 1"),
        (["--pairs", "PAIRS", "--model", "nano", "--steps", "1", "--kl", "-1"], "loss.kl_weight: "),
        (
            ["--pairs", "PAIRS", "--model", "nano", "--steps", "1", "--set", "rollouts.guided=true"],
            "rollouts.guided: ",
        ),
        (
            ["--pairs", "PAIRS", "--model", "nano", "--steps", "1", "--set", "loss.aggregation=fixed_length"],
            "fixed_length: wanted",
        ),
        (
            ["--pairs", "PAIRS", "--model", "nano", "--steps", "1", "--set", "advantage.kind=gae"],
            "advantage: ",
        ),
        (["--pairs", "BARE", "--model", "nano", "--steps", "1"], "have no label"),
        (
            ["--pairs", "PAIRS", "--model", "nano", "--steps", "1", "--group-size", "1"],
            "rollouts.group_size: ",
        ),
        (
            ["--pairs", "PAIRS", "--model", "nano", "--steps", "1", "--set", "lora.dropout=0.1"],
            "lora.dropout: got 0.1, allowed in GRPO: 0",
        ),
        (["--resume", "OUT"], "no run to resume"),
    ],
)
def test_refused_with_one_line_and_no_folder(
    given: list[str], words: str, world: Path, tmp_path: Path
) -> None:
    pairs = load_pairs(world / PAIRS_FILE)
    bare = [
        {"id": p.id, "prompt": p.prompt, "video_1": str(p.video_1), "video_2": str(p.video_2)} for p in pairs
    ]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    places = {"PAIRS": world / PAIRS_FILE, "OUT": tmp_path / "out"}
    places |= {name: tmp_path / f"{name.lower()}.jsonl" for name in ("BARE", "NONE")}
    out = [] if "--resume" in given else ["--out", tmp_path / "out"]
    done = vrthinker("train", "grpo", *out, *[places.get(arg, arg) for arg in given])
    assert (done.code, done.out) == (2, "")
    assert words in done.last_line
    assert not (tmp_path / "out").exists()


def test_a_rate_that_is_given_alone_stays_constant(world: Path) -> None:
    learn = {**values(world)["learn"], "learning_rate": {"peak": 1e-5}}
    rate = grpo_settings(values(world, learn=learn)).learn.learning_rate
    assert [rate.at(step, 10) for step in (0, 5, 9)] == [1e-5] * 3


def test_the_shipped_recipe_holds_what_it_says() -> None:
    settings = grpo_settings(load_recipe("nano-grpo"))
    assert settings.items.kind == "world"
    assert settings.items.seed >= 1000, "small seeds are for evaluations"
    assert settings.rollouts.group_size == 8
