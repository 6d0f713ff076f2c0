"""config.json files found in public: each gives its preset, or is refused for what is quantised."""

import pytest
from configs import FOLDER, INDEX, published

from gemlax import UnsupportedError, preset
from gemlax.config import from_hf

READ = [name for name, entry in INDEX.items() if "refused" not in entry]
REFUSED = [name for name in INDEX if name not in READ]


@pytest.mark.parametrize("name", READ)
def test_a_published_config_gives_its_preset(name):
    found = from_hf(published(name))
    assert found.text == preset(INDEX[name]["preset"]).text
    assert found.eos_token_id == tuple(INDEX[name]["eos_token_id"])
    assert (found.bos_token_id, found.pad_token_id) == (2, 0)


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_read_back_as_it_is_written(name):
    found = from_hf(published(name))
    assert from_hf(found.to_hf()) == found


@pytest.mark.parametrize("name", REFUSED)
def test_a_quantised_copy_is_refused_for_that_alone(name):
    config = published(name)
    with pytest.raises(UnsupportedError) as error:
        from_hf(config)
    key = INDEX[name]["refused"]
    assert str(error.value).startswith(f"config.json: {key} = ")
    assert "; " not in str(error.value)
    del config[key]
    assert from_hf(config).text == preset(INDEX[name]["preset"]).text


def test_every_file_has_its_source():
    assert {path.stem for path in FOLDER.glob("*.json")} == {"index", *INDEX}
    assert all(entry["source"] for entry in INDEX.values())
