import pytest

from fastguard import methods
from fastguard.run import config as c


def write(tmp_path, text, name="run.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return file


def test_packaged_configurations_load():
    demo = c.load("demo")
    assert demo.attack.scored_steps[-1] == 32 and not demo.variants
    quick = c.load("demo", quick=True)
    assert quick == c.shortened(demo) and quick.immunize.steps < demo.immunize.steps
    components = c.load("components")
    assert set(components.variants) == {"no noise", "no lens", "output only"}
    assert components.variant("no noise").chosen().beta == 0 and components.variant("output only").chosen().alpha == 0


@pytest.mark.parametrize("method", methods.defenses())
def test_every_method_has_a_configuration(method):
    found, entry = c.load(method), methods.find(method)
    section = methods.SECTIONS[entry.stage]
    assert getattr(found, section).method == method and entry.title in found.title
    assert found.immunize.run == (section == "immunize")
    assert found.attack == c.load("demo").attack  # attacked like the demo's model
    quick = getattr(c.load(method, quick=True), section)
    assert quick.options.items() >= dict(quick.entry.load_options().quick).items()


def test_a_seed_reaches_every_stage():
    found = c.seeded(c.load("demo"), 3)
    assert (found.data.seed, found.align.seed, found.immunize.seed, found.attack.seeds) == (3, 3, 3, (3,))
    assert c.seeded(found, 0) == c.load("demo")


def test_values_merge_over_what_they_extend(tmp_path):
    write(tmp_path, "attack: {lr: 1e-4, batch: 2}\nmodel: {name: here}\n", "base.yaml")
    found = c.load(write(tmp_path, "extends: base.yaml\nattack: {seeds: [1, 2]}\n"))
    assert found.attack.lr == (1e-4,) and found.attack.seeds == (1, 2) and found.attack.batch == 2
    assert found.model.name == "here" and found.align == c.AlignConfig()


def test_a_configuration_survives_its_own_dictionary():
    components = c.load("components")
    assert c.from_dict(components.to_dict()) == components


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("immunize: {method: magic}", "immunize.method: expected one of sft, repnoise, tar, .*, got 'magic'"),
        (
            "immunize: {method: tar, options: {inner_steps: 0}}",
            r"options\.inner_steps: expected an integer >= 1, got 0",
        ),
        (
            "immunize: {method: booster, options: {mode: fast}}",
            r"immunize\.options\.mode: expected weights or linearised",
        ),
        ("atack: {}", "atack: unknown key; expected one of .*attack"),
        ("attack: {batchsize: 3}", r"attack\.batchsize: unknown key"),
        ("attack: {batch: many}", r"attack\.batch: expected int, got 'many'"),
        ("attack: {batch: 0}", r"attack\.batch: expected an integer >= 1, got 0"),
        ("attack: {batch: true}", r"attack\.batch: expected int, got True"),
        ("align: {lr: fast}", r"align\.lr: expected a number, got 'fast'"),
        ("align: {lr: -1e-5}", r"align\.lr: expected a number > 0"),
        ("align: {lr: 0}", r"align\.lr: expected a number > 0"),
        ("attack: {lr: []}", r"attack\.lr: expected at least one"),
        ("attack: {scored_steps: [1, 2]}", r"attack\.scored_steps: expected increasing steps"),
        ("attack: {threshold: 1.5}", r"attack\.threshold"),
        ("immunize: {options: {alpha: .nan}}", r"immunize\.options\.alpha: expected a number that is finite"),
        ("immunize: {options: {layers: 0}}", r"immunize\.options\.layers: expected an integer >= 1"),
        ("immunize: {options: {boundary: odd}}", r"immunize\.options\.boundary: expected constant or predicted"),
        ("model: {dtype: float8}", r"model\.dtype: expected auto or float32 or bfloat16"),
        ("variants: {x: {options: {alhpa: 1}}}", r"variants\.x\.options\.alhpa: unknown key"),
        ("variants: {control: {}}", "names other than"),
        ("- 1", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("extends: run.yaml", "circle"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        c.load(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        c.load(tmp_path / "nowhere.yaml")
