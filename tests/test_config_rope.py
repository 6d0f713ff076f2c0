"""Rope settings: each spelling of a file gives the base, factor and share of each kind of layer."""

import logging

import pytest

from gemlax import UnsupportedError
from gemlax.config import RopeSpec, from_hf

S, F = "sliding_attention", "full_attention"
LINEAR = {"rope_type": "linear", "factor": 8.0}
DEFAULT = {"rope_type": "default"}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "layer_types": [S, F],
         "sliding_window": 32}  # fmt: skip
GEMMA_3 = SMALL | {"model_type": "gemma3_text"}
GEMMA_4 = SMALL | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
LOCAL, WHOLE = RopeSpec(1e4), RopeSpec(1e6)
SCALED = RopeSpec(1e6, 8.0)
PART = RopeSpec(1e6, 1.0, 0.25)


def read(config):
    return tuple(spec.rope for spec in from_hf(config).text.layers)


@pytest.mark.parametrize(
    ("settings", "local", "whole"),
    [
        ({}, LOCAL, WHOLE),
        ({"rope_scaling": None, "rope_parameters": None}, LOCAL, WHOLE),
        ({"rope_scaling": {}, "rope_parameters": {}}, LOCAL, WHOLE),
        ({"rope_theta": 5e5, "rope_local_base_freq": 3e4}, RopeSpec(3e4), RopeSpec(5e5)),
        ({"rope_theta": 1_000_000, "rope_local_base_freq": 10_000}, LOCAL, WHOLE),
        # rope_scaling, which is that of full layers.
        ({"rope_scaling": LINEAR}, LOCAL, SCALED),
        ({"rope_scaling": {"type": "linear", "factor": 8}}, LOCAL, SCALED),
        ({"rope_scaling": LINEAR | {"type": "linear"}}, LOCAL, SCALED),
        ({"rope_scaling": LINEAR | {"type": "default"}}, LOCAL, SCALED),
        ({"rope_scaling": LINEAR | {"rope_theta": 7e5}, "rope_theta": 5e5}, LOCAL,
         RopeSpec(7e5, 8.0)),
        ({"rope_scaling": LINEAR, "rope_theta": 5e5}, LOCAL, RopeSpec(5e5, 8.0)),
        ({"rope_scaling": LINEAR | {"original_max_position_embeddings": 512}}, LOCAL, SCALED),
        ({"rope_scaling": LINEAR | {"low_freq_factor": 0, "long_factor": None}}, LOCAL, SCALED),
        ({"rope_scaling": LINEAR | {"partial_rotary_factor": 1.0}}, LOCAL, SCALED),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, LOCAL, RopeSpec(1e6, 0.5)),
        ({"rope_scaling": {"factor": 8.0}}, LOCAL, WHOLE),
        ({"rope_scaling": DEFAULT | {"factor": 8.0}}, LOCAL, WHOLE),
        ({"rope_scaling": {F: LINEAR | {"rope_theta": 1e6}, S: DEFAULT | {"rope_theta": 1e4}}},
         LOCAL, SCALED),
        ({"rope_scaling": {F: LINEAR}}, LOCAL, SCALED),
        # rope_parameters, flat: those of full layers.
        ({"rope_parameters": LINEAR | {"rope_theta": 1e6}}, LOCAL, SCALED),
        ({"rope_parameters": LINEAR, "rope_theta": 5e5}, LOCAL, RopeSpec(5e5, 8.0)),
        ({"rope_parameters": DEFAULT | {"rope_theta": 1e6}}, LOCAL, WHOLE),
        # rope_parameters by kind.
        ({"rope_parameters": {F: LINEAR | {"rope_theta": 5e5}, S: DEFAULT | {"rope_theta": 2e4}}},
         RopeSpec(2e4), RopeSpec(5e5, 8.0)),
        ({"rope_parameters": {F: LINEAR, S: DEFAULT}, "rope_theta": 5e5}, LOCAL,
         RopeSpec(5e5, 8.0)),
        ({"rope_parameters": {F: LINEAR}}, LOCAL, SCALED),
        ({"rope_parameters": {S: LINEAR}}, RopeSpec(1e4, 8.0), WHOLE),
        ({"rope_parameters": {F: LINEAR, S: None}}, LOCAL, SCALED),
        ({"rope_parameters": {F: {"type": "linear", "factor": 8.0}, S: DEFAULT}}, LOCAL, SCALED),
        ({"rope_parameters": {F: {"rope_theta": 3e5}}, "rope_scaling": LINEAR}, LOCAL,
         RopeSpec(3e5, 8.0)),
        ({"rope_parameters": {F: DEFAULT, S: DEFAULT, "rope_type": "linear", "factor": 8.0}},
         LOCAL, WHOLE),
        # A part of a head.
        ({"rope_parameters": {F: {"rope_type": "proportional", "partial_rotary_factor": 0.25}}},
         LOCAL, PART),
        ({"rope_parameters": {F: {"rope_type": "proportional"}}}, LOCAL, WHOLE),
        ({"rope_parameters": {F: {"rope_type": "proportional"}}, "partial_rotary_factor": 0.25},
         LOCAL, PART),
        ({"rope_parameters": {F: DEFAULT | {"partial_rotary_factor": 0.5}}}, LOCAL, WHOLE),
        ({"partial_rotary_factor": 0.5}, LOCAL, WHOLE),
        ({"rope_parameters": {F: {"rope_type": "proportional", "factor": 4.0,
                                  "partial_rotary_factor": 0.0}}}, LOCAL,
         RopeSpec(1e6, 4.0, 0.0)),
    ],
    ids=str,
)  # fmt: skip
def test_gemma_3_reads_each_spelling(settings, local, whole):
    assert read(GEMMA_3 | settings) == (local, whole)


BOTH = {F: LINEAR | {"rope_theta": 1e6}, S: DEFAULT | {"rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("settings", "local", "whole"),
    [
        ({}, LOCAL, PART),
        ({"rope_parameters": None}, LOCAL, PART),
        ({"rope_parameters": {}, "rope_scaling": {}}, LOCAL, PART),
        ({"rope_theta": 5e5, "partial_rotary_factor": 0.5}, LOCAL, PART),
        ({"rope_parameters": BOTH}, LOCAL, SCALED),
        ({"rope_scaling": BOTH}, LOCAL, SCALED),
        ({"rope_parameters": BOTH | {"rope_type": "default"}}, LOCAL, SCALED),
        ({"rope_parameters": {F: LINEAR, S: DEFAULT}, "rope_theta": 5e5}, RopeSpec(5e5),
         RopeSpec(5e5, 8.0)),
        ({"rope_parameters": BOTH | {S: LINEAR | {"rope_theta": 1e4}}}, RopeSpec(1e4, 8.0),
         SCALED),
        ({"rope_parameters": BOTH | {F: {"rope_type": "proportional", "rope_theta": 1e6,
                                         "partial_rotary_factor": 0.25, "factor": 8.0}}},
         LOCAL, RopeSpec(1e6, 8.0, 0.25)),
        ({"rope_parameters": BOTH | {F: {"rope_type": "proportional", "rope_theta": 1e6}},
          "partial_rotary_factor": 0.25}, LOCAL, PART),
    ],
    ids=str,
)  # fmt: skip
def test_gemma_4_reads_its_settings_by_kind(settings, local, whole):
    assert read(GEMMA_4 | settings) == (local, whole)


@pytest.mark.parametrize(
    ("base", "settings", "said"),
    [
        (GEMMA_3, {"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number"),
        (GEMMA_3, {"rope_scaling": LINEAR | {"factor": "8"}}, "factor must be a positive number"),
        (GEMMA_3, {"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}},
         "only 'proportional' turns a part of a head"),
        (GEMMA_3, {"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "'proportional'"),
        (GEMMA_3, {"rope_theta": "1e6"}, "rope_theta must be a positive number"),
        (GEMMA_3, {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 1.5}},
         "partial_rotary_factor must be in [0, 1], got 1.5"),
        (GEMMA_3, {"rope_scaling": {"rope_type": "su", "factor": 8.0}}, "rope_type 'su' of full"),
        (GEMMA_3, {"rope_scaling": {"rope_type": ["linear"]}}, "rope_type ['linear']"),
        (GEMMA_3, {"rope_scaling": "linear"}, "must be objects, got 'linear' in rope_scaling"),
        (GEMMA_3, {"rope_parameters": BOTH | {"chunked_attention": {}}}, "has ['chunked_attention"),
        *((GEMMA_3, {"rope_scaling": LINEAR | {"rope_type": name}}, f"rope_type '{name}' of full")
          for name in ("dynamic", "yarn", "llama3", "longrope")),
        (GEMMA_4, {"rope_parameters": BOTH | {F: LINEAR | {"rope_type": "yarn", "rope_theta": 1}}},
         "rope_type 'yarn' of full_attention"),
        (GEMMA_4, {"rope_parameters": LINEAR | {"rope_theta": 1e6}}, "for each kind of layer"),
        (GEMMA_4, {"rope_scaling": LINEAR}, "rope_scaling must hold settings for each kind"),
        (GEMMA_4, {"rope_parameters": {F: BOTH[F]}}, "add sliding_attention"),
        (GEMMA_4, {"rope_parameters": BOTH | {S: None}}, "add sliding_attention"),
        (GEMMA_4, {"rope_parameters": {F: LINEAR, S: DEFAULT}}, "has no rope_theta; add it"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(base, settings, said):
    with pytest.raises(UnsupportedError) as error:
        from_hf(base | settings)
    assert said in str(error.value)


def test_settings_of_a_kind_without_layers_are_not_needed():
    only = GEMMA_4 | {"layer_types": [F, F], "rope_parameters": {F: BOTH[F]}}
    assert read(only) == (SCALED, SCALED)


def test_one_line_says_which_settings_are_passed_over(caplog):
    caplog.set_level(logging.INFO)
    read(GEMMA_3 | {"rope_scaling": LINEAR | {"original_max_position_embeddings": 512, "foo": 1}})
    (record,) = caplog.records
    assert "foo of 'linear', original_max_position_embeddings of 'linear'" in record.getMessage()
