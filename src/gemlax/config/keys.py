"""Which keys of a config.json (or of GGUF metadata) pass that nothing here reads.

A key passes where it cannot change the answer: its value is neutral (null, false, 0, "", [], {}),
it is known to be inert, or it repeats what the architecture has anyway. Every other key is refused
by name. What passed though it is not known is said in one log line.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gemlax.errors import UnsupportedError, show_value

__all__ = [
    "is_inert",
    "is_neutral",
    "log_aside",
    "refuse_keys",
    "sort_keys",
]

_log = logging.getLogger(__name__)

# What transformers 4 and 5 write into every config.json, and reads for nothing but itself.
# Source: transformers 4.57 and 5.23, configuration_utils.py, PretrainedConfig.
_TRANSFORMERS = {
    "architectures", "attention_dropout", "cache_implementation", "chunk_size_feed_forward",
    "classifier_dropout", "dtype", "finetuning_task", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "label2id", "model_parallel", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "prefix", "pretraining_tp", "problem_type",
    "return_dict", "task_specific_params", "tf_legacy_loss", "tie_last_hidden_states",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
    "use_cache", "serialize_explicit_per_layer_config", "allow_global_per_layer_attribute_access",
    "_name_or_path", "_commit_hash", "_flash_attn_2_enabled", "_from_model_config",
    "attn_implementation", "experts_implementation", "base_model_tp_plan", "base_model_pp_plan",
    # Only rope types that are refused read it.
    "original_max_position_embeddings",
}  # fmt: skip
# Settings of generation, which config.json held before generation_config.json was there.
# transformers 5 drops them when it reads the file. Source: its GenerationConfig.
_GENERATION = {
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "bad_words_ids", "begin_suppress_tokens", "cache_config", "constraints", "diversity_penalty",
    "do_sample", "dola_layers", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "guidance_scale", "length_penalty",
    "low_memory", "max_length", "max_new_tokens", "max_time", "min_length", "min_new_tokens",
    "min_p", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_logits", "output_scores",
    "penalty_alpha", "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
    "repetition_penalty", "return_dict_in_generate", "sequence_bias", "stop_strings",
    "suppress_tokens", "target_lookbehind", "temperature", "token_healing", "top_k", "top_p",
    "typical_p", "watermarking_config",
}  # fmt: skip
# What tools that train, convert and serve leave behind.
_TOOLS = {
    # mlx, and arguments of losses and of `from_pretrained`.
    "ignore_index", "skip_vision", "loss_type", "label_smoothing", "neftune_noise_alpha",
    "output_router_logits", "router_aux_loss_coef", "use_liger_kernel", "device_map", "revision",
    "trust_remote_code", "seed",
    "auto_map", "model_name", "base_model", "license", "library_name", "tags",
    "sentence_transformers", "custom_pipelines", "transformers.js_config", "processor_class",
    "max_seq_length", "model_max_length", "padding_side", "truncation_side", "use_flash_attn",
    "tokenizer_padding_side", "tokenizer_model_max_length", "mask_max_position_embeddings",
    "freq_max_position_embeddings",
    # EasyDeL: how its own programs are cut up and compiled.
    "attn_dtype", "attn_mechanism", "attn_softmax_dtype", "axis_dims", "axis_names", "backend",
    "blocksize_b", "blocksize_k", "blocksize_q", "dcn_axis_dims", "decode_attn_mechanism",
    "easy_method", "fcm_max_ratio", "fcm_min_ratio", "flash_attention_backward_pass_impl",
    "fsdp_is_ep_bound", "gradient_checkpointing_targets", "hardware_abstraction",
    "kv_cache_sharding_sequence_axis_name", "lmhead_chunksize", "moe_force_xla_gmm", "moe_method",
    "moe_tiling_size_batch", "moe_tiling_size_dim", "moe_tiling_size_seqlen", "operation_configs",
    "pallas_k_block_size", "pallas_m_block_size", "pallas_n_block_size", "partition_axis",
    "platform", "precompute_masks", "scan_attention_layers", "scan_layers", "scan_mlp_chunk_size",
    "scan_ring_attention", "sequence_axis_name", "shard_attention_computation",
    "sharding_axis_dims", "sharding_axis_names", "sharding_dcn_axis_dims", "sp_is_ep_bound",
    "use_expert_tensor_mode", "use_ring_of_experts", "use_scan_mlp", "use_sharded_kv_caching",
    "use_sharding_constraint",
}  # fmt: skip
_INERT = _TRANSFORMERS | _GENERATION | _TOOLS
_INERT_PREFIXES = (
    "unsloth_", "_attn_implementation", "_experts_implementation", "trl_", "peft_", "axolotl_",
    "mlx_", "kv_cache_quantization_", "_unsloth_",
    # Of the encoders and of what joins them to the text.
    "vision_", "audio_", "image_", "video_", "mm_", "projector_", "multimodal_projector_",
)  # fmt: skip
# Ids that stand for something else than text; the ids that end it are read, and so are known.
_INERT_SUFFIXES = ("_token_id", "_token_ids", "_token_index")
_RUNS_CODE = {"auto_map", "custom_pipelines"}


def is_neutral(value: Any) -> bool:
    """Return whether a value says that there is nothing: null, false, 0, "", [] or {}."""
    return value is None or (isinstance(value, (bool, int, float, str, list, dict)) and not value)


def is_inert(key: str) -> bool:
    """Return whether a key of config.json is known to change nothing, whatever its value."""
    return key in _INERT or key.startswith(_INERT_PREFIXES) or key.endswith(_INERT_SUFFIXES)


def sort_keys(
    found: Mapping[str, Any],
    read: Collection[str],
    allowed: Mapping[str, tuple[Any, ...]],
    same: Mapping[str, Any],
    prefix: str = "",
) -> tuple[list[str], list[str]]:
    """Return what is wrong with the keys of a file, and which of them were passed over.

    Args:
        found: the keys and their values.
        read: the keys that are read.
        allowed: the keys that pass at some values only.
        same: what the architecture has under names that are not read: only a copy passes.
        prefix: put before each name.
    """
    wrong, aside = [], []
    for key, value in found.items():
        name = prefix + key
        if value is None or (key in read and key not in allowed):
            continue
        if key in allowed:
            if value not in allowed[key]:
                expected = f"only {allowed[key][0]!r} is supported"
                wrong.append(f"{name} = {show_value(value)} ({expected})")
        elif is_inert(key):
            if key in _GENERATION and not is_neutral(value):
                aside.append(name)
            elif key in _RUNS_CODE and value:
                aside.append(f"{name} (its code is not run)")
        elif key in same:
            if value != same[key] and not (is_neutral(value) and is_neutral(same[key])):
                wrong.append(
                    f"{name} = {show_value(value)} (the model has {show_value(same[key])})"
                )
        elif is_neutral(value):
            aside.append(name)
        else:
            wrong.append(f"{name} = {show_value(value)} (not known)")
    return wrong, aside


def refuse_keys(where: str, wrong: Iterable[str]) -> None:
    """Raise one UnsupportedError that names all keys which are wrong, if there are any."""
    if text := "; ".join(sorted(wrong)):
        raise UnsupportedError(f"{where}: {text}")


def log_aside(where: str, aside: Iterable[str]) -> None:
    """Say in one line which keys were passed over."""
    if names := ", ".join(aside):
        _log.info("%s: passed over, as it changes nothing here: %s", where, names)
