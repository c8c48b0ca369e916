"""Settings of views as version 0.1 named them: refused from users, understood in files of earlier runs."""

from dataclasses import replace

import pytest
import yaml

from fixtures.paths import TESTS
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.loading import load_config
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.transforms.composition import RENAMED, upgraded_views
from iwm_fast.pipelines.transforms.operations.gamma import Gamma
from iwm_fast.pipelines.transforms.operations.jitter import Jitter

OLD_RUN = TESTS / "fixtures" / "run_e678dd7" / "run"


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(tmp_path, old):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"views": {old.removeprefix("views."): 0.5}}))
    message = f"'{old}' is now named '{RENAMED[old]}'"
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=message):
        load_config("demo", [f"{old}=0.5"])


def test_a_run_of_version_0_1_has_its_settings_under_the_new_names():
    old = yaml.safe_load((OLD_RUN / "config.yaml").read_text())["views"] | {"hue": 0.3, "source_crop": [0.5, 1.0]}
    views = upgraded_views(old)
    assert views["jitter"]["hue"] == 0.3 and views["crop"]["source_scale"] == [0.5, 1.0] and views["size"] == 16
    assert not views.keys() & {name.removeprefix("views.") for name in RENAMED}
    # What a present default is does not matter.
    assert views["jitter"]["encoding"] == "difference"
    assert upgraded_views(views) == views
    assert load_config(OLD_RUN / "config.yaml").views.blur.sigma == (0.1, 1.0)


def test_a_run_may_be_based_on_the_settings_of_an_old_one(tmp_path):
    text = f"base: {OLD_RUN / 'config.yaml'}\nviews: {{jitter: {{hue: 0.3}}}}\n"
    (tmp_path / "run.yaml").write_text(text)
    views = load_config(tmp_path / "run.yaml").views
    assert (views.jitter.hue, views.jitter.brightness, views.blur.sigma) == (0.3, 0.4, (0.1, 1.0))


def test_the_fingerprint_of_an_old_checkpoint_matches_the_present_one():
    saved = checkpoints.read(OLD_RUN / "checkpoints" / "step-00000002")
    config = load_config(saved.folder / "config.yaml")
    assert checkpoints.differing_settings(saved.fingerprint, fingerprint(config, saved.fingerprint["data.train"])) == []
    for views, name in (
        (replace(config.views, jitter=Jitter(hue=0.2)), "views.jitter.hue"),
        (replace(config.views, jitter=Jitter(encoding="log_ratio")), "views.jitter.encoding"),
        (replace(config.views, gamma=Gamma(probability=0.1)), "views.gamma.probability"),
    ):
        changed = fingerprint(replace(config, views=views), saved.fingerprint["data.train"])
        with pytest.raises(checkpoints.CheckpointError, match=f"{name}: "):
            checkpoints.differing_settings(saved.fingerprint, changed)


def test_settings_of_a_transformation_that_is_off_are_not_in_the_fingerprint():
    flat = fingerprint(RunConfig(), "x")
    assert flat["views.gamma.probability"] is None and flat["views.jitter.model"] is None
    changed = replace(RunConfig(), views=replace(RunConfig().views, gamma=Gamma(strength=0.5)))
    assert fingerprint(changed, "x")["views.gamma.strength"] == 0.5
