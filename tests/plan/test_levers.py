"""Levers: what each does to a step, and the published run of 70B with them; micro-batches and groups against a run."""

from __future__ import annotations

import dataclasses

import pytest

from fastguard import methods
from fastguard.plan import hardware, levers, passes
from fastguard.plan.architecture import find
from fastguard.plan.cost import Cost, Recipe
from fastguard.plan.estimate import Estimate, divided, estimate, usable
from fastguard.plan.parts import Part, item, peak
from fastguard.plan.setting import Efficiency, Setting

TAR = methods.find("tar")
COST, OPTIONS = TAR.load_cost(), TAR.load_options()()


def job(gpus: int = 64, **changes) -> Setting:
    """The published run of TAR on Llama-3-70B, with these changes."""
    run = {"global_batch": TAR.batch, "tokens": TAR.tokens, "steps": TAR.steps}
    return Setting(find("llama-3-70b"), gpus=gpus, **{**run, **changes})


LARGE = {"global_batch": 512, "tokens": 2048}


def tar(s: Setting, **options) -> Recipe:
    return COST.here(dataclasses.replace(s, given=frozenset(options)), TAR.load_options()(**options))


def named(recipe: Recipe, name: str) -> Part:
    [part] = [part for part in recipe.parts if part.name == name]
    return part


def planned(s: Setting) -> Estimate:
    return estimate(s, COST, OPTIONS)


def test_the_published_run_of_70b_takes_what_was_worked_out_for_it():
    """By hand, at 2 s a pass of 560 GB: 82 passes a step; adapters do not reduce; a base in the node does not move."""
    exact = levers.exact(job())
    hours = {name: planned(levers.deviation(exact, name)).hours for name in levers.DEVIATIONS}
    assert 34 < planned(exact).hours < 35
    assert 26 < hours["bf16_reductions"] < 29 and 20.5 < hours["lora_adversary"] < 21.5
    assert 8.5 < hours["node_adversary"] < 10 and 4.7 < hours["persistent_adversary"] < 5.3
    assert planned(levers.exact(job(32))).memory < 53e9 < usable(job()) and planned(exact).fewest == 24
    assert planned(exact).bound == ("network", pytest.approx(6.0 * 0.36 / 0.4, rel=0.02))


@pytest.mark.parametrize("name", levers.EXACT)
def test_an_exact_lever_takes_memory_off_the_gpu_and_changes_no_product(name):
    exact = levers.exact(job(**LARGE))
    without = levers.EXACT[name].released(exact)
    assert levers.EXACT[name].pulled(without) == exact != without
    assert levers.exact(job(**LARGE), frozenset({name})) == without
    more, less = planned(without), planned(exact)
    assert less.memory < more.memory - 4e9 and less.seconds < 1.01 * more.seconds
    assert sum(p.flops for p in tar(exact).parts) == sum(p.flops for p in tar(without).parts)
    on_host = name.endswith("on_host")
    assert (less.host > more.host) == on_host
    assert (less.needs["host"] > more.needs["host"]) == on_host


def test_one_gpu_has_no_groups():
    alone = job(1)
    assert tar(dataclasses.replace(alone, own_groups=True)) == tar(alone)
    assert tar(dataclasses.replace(job(2), own_groups=True)) != tar(job(2))


def test_what_waits_on_the_host_crosses_the_bus_there_and_back():
    s = job()
    near, there = tar(s), tar(dataclasses.replace(s, outer="host"))
    bus = sum(p.host for p in there.parts) - sum(p.host for p in near.parts)
    assert bus == pytest.approx(2 * 8 * s.shard)  # two fp32 moments
    [outer] = [i for i in there.items if i.name == "outer optimizer" and not i.host]
    assert outer.moments is not None and not any(m.startswith(("attack", "tamper")) for m in outer.moments)


def test_micro_batches_make_the_same_products_in_less_memory_and_gather_as_often_as_there_are():
    s = job(**LARGE)
    whole, divided_ = tar(s), tar(dataclasses.replace(s, micro=2))
    assert peak(divided_.items)[1] < 0.75 * peak(whole.items)[1]
    for name, times in (("attack: forward", 2), ("tamper: backward", 4), ("retain: head", 4)):
        one, several = named(whole, name), named(divided_, name)
        assert several.flops == pytest.approx(one.flops) and several.count == times * one.count
        assert several.network == pytest.approx(times * one.network)


def test_micro_batches_are_the_largest_that_fit_and_none_where_the_batch_fits():
    s = levers.exact(job(**LARGE, efficiency=Efficiency(usable=0.5)))
    found = divided(s, COST, OPTIONS)

    def fits(micro):
        return peak(COST.here(dataclasses.replace(s, micro=micro), OPTIONS).items)[1] <= usable(s)

    assert 1 <= found.micro < s.batch and fits(found.micro) and not fits(found.micro + 1)
    assert divided(levers.exact(job()), COST, OPTIONS).micro is None
    assert divided(dataclasses.replace(s, micro=7), COST, OPTIONS).micro == 7
    assert divided(s, Cost(COST.here, COST.published), OPTIONS) == s


def test_repnoise_divides_the_harmless_half_and_leaves_the_harmful_one_whole():
    entry = methods.find("repnoise")
    s = Setting(find("llama-3-70b"), **LARGE)
    whole, apart = (
        entry.load_cost().here(dataclasses.replace(s, micro=micro), entry.load_options()()) for micro in (None, 2)
    )
    # Of the half whose MLP outputs nobody reads, the last product is not computed again.
    assert sum(p.flops for p in apart.parts) == pytest.approx(sum(p.flops for p in whole.parts), rel=0.04)
    assert named(apart, "harmless: forward").count == 4 and named(apart, "harmful: forward").count == 1
    assert named(apart, "noise (MMD)") == named(whole, "noise (MMD)")
    assert peak(apart.items)[1] < 0.75 * peak(whole.items)[1]


def test_bf16_reductions_are_those_of_the_attackers_steps_alone():
    s = levers.exact(job())
    full, narrow = tar(s), tar(levers.deviation(s, "bf16_reductions"))
    a = s.architecture
    fewer = named(full, "attack: backward").network - named(narrow, "attack: backward").network
    assert fewer == pytest.approx(64 * 2 * a.parameters * s.moved)
    assert named(full, "tamper: backward") == named(narrow, "tamper: backward")
    assert tar(s, bf16_reductions=True) == narrow


def test_bf16_moments_of_attackers_are_half_of_fp32_ones():
    s = levers.exact(job())
    recipe = tar(levers.deviation(s, "bf16_moments"))
    assert [i.bytes for i in recipe.items if i.name == "inner optimizer"] == [2 * 2 * s.shard]
    assert named(recipe, "inner AdamW").memory == pytest.approx(64 * s.shard * (3 * 4 + 4 * 2))


def test_an_attacker_who_trains_adapters_reduces_none_of_the_base_and_needs_no_snapshot():
    s = levers.exact(job())
    recipe = tar(levers.deviation(s, "lora_adversary"))
    a, adapter = s.architecture, s.architecture.adapter(16)
    gathered = 2 * a.layers * a.layer + 2 * adapter
    assert named(recipe, "attack: backward").network == pytest.approx(64 * (gathered + 4 * adapter) * s.moved)
    assert not {"snapshot", "restore"} & ({p.name for p in recipe.parts} | {i.name for i in recipe.items})
    assert named(recipe, "tamper: backward") == named(tar(s), "tamper: backward")  # its gradient is all weights'
    assert tar(s, adversary="lora") == recipe
    one, four = (named(r, "attack: forward") for r in (recipe, tar(s, adversary="lora", adversaries=4)))
    assert four.network == one.network and four.flops == pytest.approx(4 * one.flops)
    stays = tar(s, adversary="lora", adversaries=4, gathered=True)
    base, adapters = (named(stays, n).network for n in ("base gathered up to a read", "adapters added up"))
    assert base == 16 * 2 * a.parameters * s.moved and named(stays, "attack: backward").network == 0
    assert adapters == pytest.approx(64 * 4 * 2 * 4 * adapter * s.moved)
    with pytest.raises(
        ValueError, match="adversary: expected weights, those of the adapters that are trained, got lora"
    ):
        tar(dataclasses.replace(s, lora=8, adversary="lora"))


def test_attackers_in_the_nodes_wait_for_all_reduces_and_not_for_the_network():
    s = levers.exact(job())
    recipe = tar(levers.deviation(s, "node_adversary"))
    attack = named(recipe, "attack: forward and backward in the node")
    stream = 4 * 256 * 8192 * 2  # 32 sequences for 8 nodes
    assert attack.network == 0 and attack.node == pytest.approx(64 * 80 * 4 * 2 * 7 / 8 * stream)
    assert attack.seconds(s) == pytest.approx(attack.needs(s)["compute"] + attack.needs(s)["network"])
    [base] = [i.bytes for i in recipe.items if i.name == "base in the node"]
    assert base == 2 * s.architecture.parameters / 8
    large = tar(levers.deviation(levers.exact(job(**LARGE)), "node_adversary"))
    assert named(large, attack.name).node == pytest.approx(6 / 4 * attack.node * 8 * 8)  # computed again


def test_attackers_who_are_kept_go_a_few_steps_further_and_wait_with_their_optimizers():
    s = levers.exact(job())
    kept = levers.deviation(s, "persistent_adversary")
    assert named(tar(kept), "attack: forward").count == 8 and named(tar(kept), "tamper: forward").count == 2
    assert named(tar(dataclasses.replace(kept, fresh=2)), "tamper: forward").count == 1
    assert named(tar(kept, inner_steps=4), "attack: forward").count == 4
    [waits] = [i for i in tar(kept).items if i.name == "attackers who wait"]
    assert waits.host and waits.bytes == pytest.approx(12 * s.shard)
    assert tar(s, persistent=True, fresh=8) == tar(kept)  # the option of a run, by which it is planned too
    assert not [i for i in tar(s, persistent=True, fresh=64).items if i.name == "attackers who wait"]


def test_deviations_can_be_had_together_and_unknown_names_are_refused():
    s = levers.exact(job())
    both = levers.deviation(s, "lora_adversary+persistent_adversary")
    assert (both.adversary, both.persistent) == ("lora", True)
    assert planned(both).seconds < planned(levers.deviation(s, "persistent_adversary")).seconds
    with pytest.raises(ValueError, match=r"deviation: expected some of bf16_reductions.*, got 'luck'"):
        levers.deviation(s, "lora_adversary+luck")
    with pytest.raises(ValueError, match=r"some that go together, got 'lora_adversary\+node_adversary'"):
        levers.deviation(s, "lora_adversary+node_adversary")
    with pytest.raises(ValueError, match=r"without: expected some of late_head.*, got 'luck'"):
        levers.exact(s, frozenset({"luck"}))
    assert {*levers.EXACT, *levers.DEVIATIONS, levers.MICRO} > levers.NOT_BUILT
    assert not levers.built("lora_adversary") and not levers.built("bf16_moments+persistent_adversary")
    assert levers.built("lora_adversary+persistent_adversary") == " (not built)"


def test_batches_are_rounded_up_to_one_a_gpu_and_it_is_said():
    s = job(48)
    assert (s.batch, s.share(32)) == (2, 1)
    assert s.rounded("batch", 64) == ("batch: 64 sequences are rounded up to 96, 2 a GPU",)
    assert s.rounded("batch", 96) == ()
    assert tar(job()).deviations == ("attackers' batch: 32 sequences are rounded up to 64, 1 a GPU",)
    assert tar(job(32)).deviations == tar(job(), batch=2).deviations == ()


# What binds.


def of_parts(*parts: Part, memory: float = 0.0) -> Estimate:
    recipe = Recipe(list(parts), [item("all", memory)])
    cost = Cost(lambda s, o: recipe, lambda s, o: recipe)
    return estimate(job(efficiency=Efficiency(0.5, 0.5, 0.5, 0.5)), cost, OPTIONS)


def test_what_binds_is_what_takes_longest_and_memory_where_a_step_does_not_fit():
    compute, network = Part("", "", flops=0.5 * 989.4e12), Part("", "", network=3 * 200e9)
    assert of_parts(compute, network).bound == ("network", pytest.approx(3.0))
    assert of_parts(compute.times(6), network).bound == ("compute", pytest.approx(2.0))
    assert of_parts(Part("", "", node=225e9)).needs["network"] == pytest.approx(1.0)
    too_much = of_parts(compute, memory=2 * usable(job()))
    assert too_much.bound == ("memory", pytest.approx(2.0)) and not too_much.fits and too_much.fewest is None


def test_collectives_inside_a_node_wait_for_their_products():
    s = job(efficiency=Efficiency(0.5, 0.5, 0.5, 0.5, 1.0))
    assert Part("", "", flops=0.5 * 989.4e12, network=200e9).seconds(s) == pytest.approx(1.0)
    assert Part("", "", flops=0.5 * 989.4e12, node=225e9).seconds(s) == pytest.approx(2.0)


@pytest.mark.parametrize("name", hardware.GPUS)
def test_a_gpus_efficiency_is_that_of_its_published_run(name):
    """Products of a sequence, forward and backward, with all or none recomputed, at the tokens a second published."""
    gpu = hardware.GPUS[name]
    run = gpu.throughput
    s = Setting(find(run.model), gpus=8, global_batch=8, tokens=run.tokens, gpu=gpu, checkpointing=run.recomputed)
    head = 6 * run.tokens * s.architecture.head
    flops = sum(part.flops for part in passes.run(s, "step", 1)) + head
    assert flops / run.tokens * run.per_second / gpu.flops == pytest.approx(gpu.matmul, abs=0.01)
    assert s.matmul == gpu.matmul and dataclasses.replace(s, efficiency=Efficiency(matmul=0.5)).matmul == 0.5
