"""Every reference number is compared with by a test, or it is written here why not."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest

from tests.support.diffusion import GOLDEN_DIR

# Beginning of a name -> the tests that compare it, as module:test.
TESTED: dict[str, dict[str, str]] = {
    "schedules.npz": {
        "linear_T": "test_schedule:test_official_tables_equal_the_published_buffers",
        "power_ratio1_T": "test_schedule:test_official_tables_equal_the_published_buffers",
        "ddimconv_": "test_schedule:test_official_tables_equal_the_published_buffers",
        "exp6_reinit_T1000": "test_schedule:test_official_tables_equal_the_published_buffers",
        "gen_linear_f64/": "test_schedule:test_linear_weights_equal_the_published_ones",
        "gen_power_f32/increased": "test_schedule:test_power_weights_equal_the_published_ones",
        "gen_power_f32/decreased": "test_schedule:test_power_weights_equal_the_published_ones",
        "gen_power_f32/average": "test_schedule:test_even_and_bell_shaped_weights_equal_the_published_ones",
        "gen_power_f32/normal": "test_schedule:test_even_and_bell_shaped_weights_equal_the_published_ones",
        "betas_for_alpha_bar/": "test_schedule:test_squared_cosine_betas_equal_the_published_ones",
    },
    "diffusion.npz": {
        "inputs/": "test_process:test_the_inputs_of_the_reference_numbers_are_the_described_patterns",
        "q_sample/": "test_process:test_q_sample_equals_the_published_one",
        "q_sample_ddimconv/": "test_process:test_q_sample_of_generation_equals_the_published_one",
        "q_posterior/": "test_process:test_posterior_equals_the_published_one",
        "q_posterior/t0_999/mean_from": "test_process:test_two_term_posterior_mean_equals_the_published_one",
        "q_posterior/t500_1/mean_from": "test_process:test_two_term_posterior_mean_equals_the_published_one",
        "two_time_inputs_": "test_process:test_clock_times_equal_the_published_ones",
        "predictions/": "test_objective:test_predictions_equal_the_published_ones",
        "predictions_edge_t0_999/": "test_objective:test_predictions_at_both_ends_equal_the_published_ones",
        "predictions_exp4_power/": (
            "test_objective:test_x0_prediction_with_the_power_schedule_equals_the_published_one"
        ),
        "predictions_exp0_gen/": (
            "test_objective:test_predictions_from_both_or_one_of_two_outputs_equal_the_published_ones"
        ),
        "p_mean_variance/": "test_objective:test_ancestral_moments_equal_the_published_ones",
        "traj_cond/": "test_sampler:test_restoration_trajectories_equal_the_published_ones",
        "traj_gen/": "test_sampler:test_generation_trajectories_equal_the_published_ones",
        "traj_cond_single/": "test_sampler:test_single_output_trajectories_equal_the_published_ones",
        "traj_translation/": "test_sampler:test_translation_trajectory_with_clock_times_equals_the_published_one",
        "traj_ddpm/": "test_sampler:test_ancestral_trajectories_equal_the_published_ones",
        "traj_path_indep/": "test_path:test_two_pass_trajectories_and_times_equal_the_published_ones",
        "model_input_with_mask/": "test_model:test_images_enter_in_the_published_order",
    },
    "diffusion_scalars.json": {
        "losses_exp2_T1000_s1_t300_800_unless_named": "test_objective:test_losses_equal_the_published_ones",
        "aosa_exp3": "test_selection:test_terms_and_gradient_of_the_search_equal_the_published_ones",
        "times_fed": "test_path:test_two_pass_trajectories_and_times_equal_the_published_ones",
        "ddim_timestep_subsets": "test_sampler:test_visited_timesteps_equal_the_published_ones",
    },
    "ddim_to_rddm.npz": {
        "inputs/x_T": "test_ddim:test_the_start_is_the_published_one",
        "coef/": "test_ddim:test_coefficients_equal_the_published_ones",
        "ddim/": "test_ddim:test_trajectories_equal_the_published_ones",
        "rddm/": "test_ddim:test_trajectories_equal_the_published_ones",
        "rddm_adjust_alpha/": "test_ddim:test_trajectories_with_readjusted_alpha_equal_the_published_ones",
    },
    "ddim_to_rddm.json": {"S": "test_ddim:test_ddim_and_rddm_differ_by_as_much_as_was_published"},
    "unet.npz": {
        "A/modules/": "test_model:test_modules_equal_the_published_ones",
        "B/modules/": "test_model:test_modules_equal_the_published_ones",
        "A/unet/": "test_model:test_unets_equal_the_published_ones_at_every_stage",
        "B/unet/": "test_model:test_unets_equal_the_published_ones_at_every_stage",
        "A/unetres/": "test_model:test_networks_of_every_kind_equal_the_published_ones",
        "B/unetres/": "test_model:test_networks_of_every_kind_equal_the_published_ones",
        "sinusoidal/": "test_model:test_sinusoidal_embedding_equals_the_published_one",
    },
    "unet_meta.json": {
        "A/modules/": "test_model:test_modules_equal_the_published_ones",
        "B/modules/": "test_model:test_modules_equal_the_published_ones",
        "A/unet/": "test_model:test_unets_equal_the_published_ones_at_every_stage",
        "B/unet/": "test_model:test_unets_equal_the_published_ones_at_every_stage",
        "A/unetres/": "test_model:test_networks_of_every_kind_equal_the_published_ones",
        "B/unetres/": "test_model:test_networks_of_every_kind_equal_the_published_ones",
        "selfcond+cond": "test_model:test_self_conditioned_networks_see_their_estimate_under_every_condition",
    },
    "state_dict_keys.json": {
        "Unet": "test_model:test_state_dicts_have_the_published_keys_in_order",
        "ResidualDiffusion": "test_published:test_a_file_of_two_unets_has_the_authors_layout",
        "EMA": "test_published:test_a_file_of_two_unets_has_the_authors_layout",
        "summary": "test_model:test_every_variant_has_the_published_keys_and_size",
    },
    "train_steps.json": {"exp": "test_train_steps:test_plain_steps_equal_the_published_ones"},
    "ema.json": {"rows": "test_ema:test_the_published_rule_is_reproduced"},
    "data_pipeline.npz": {
        "resize_": "test_preprocess:test_every_official_result_is_reproduced",
        "crop_": "test_preprocess:test_every_official_result_is_reproduced",
        "equalizeHist": "test_preprocess:test_equalize_is_opencvs_channel_by_channel",
        "pil_bicubic": "test_preprocess:test_resize_is_pillows_bicubic",
    },
    "data_pipeline.json": {
        "resize_": "test_preprocess:test_cases_are_padded_as_officially",
        "crop_": "test_preprocess:test_cases_are_padded_as_officially",
        "pad_bottom_right_table": "test_preprocess:test_padding_follows_the_table",
    },
}
# What is not compared. posterior_* at index 0 of the re-initialised schedules is compared; their first increments are
# not (test_schedule says why). In ddim_to_rddm.json "original-our" compares two versions of the authors' own scheduler.
# Of unet_meta.json, state dicts, stages and sizes are compared; shape, mean, std, first8 and last4 only repeat arrays
# of unet.npz, which are compared whole. Its notes on self-conditioning with a condition tell of a defect that is not
# reproduced (it works here, which the named test shows).
NOT_COMPARED = {
    "ema.json": ("toy",),  # how the rows were made
    "data_pipeline.json": ("flist under numpy",),  # what the official reader makes of a file list
}


@pytest.mark.parametrize("file", TESTED)
def test_every_reference_number_has_its_test(file: str) -> None:
    path = GOLDEN_DIR / file
    names: list[str] = list(json.loads(path.read_text()) if path.suffix == ".json" else np.load(path).files)
    accounted = (*TESTED[file], *NOT_COMPARED.get(file, ()))
    assert names and [name for name in names if not name.startswith(accounted)] == []
    for start, where in TESTED[file].items():
        assert any(name.startswith(start) for name in names), f"{start} names nothing"
        module, test = where.split(":")
        tests: Any = importlib.import_module(f"tests.unit.{module}")
        assert callable(getattr(tests, test))


def test_every_file_of_reference_numbers_is_in_the_table() -> None:
    assert {path.name for path in GOLDEN_DIR.iterdir() if path.suffix in (".npz", ".json")} == set(TESTED)


def test_names_of_families_are_listed_whole() -> None:
    """The tests that are given lists of names, instead of all of a kind in a file, list all of them."""
    from tests.unit.test_schedule import FAMILIES

    families = {name.split("/")[0] for name in np.load(GOLDEN_DIR / "schedules.npz").files}
    assert families - {"gen_linear_f64", "gen_power_f32", "betas_for_alpha_bar"} == set(FAMILIES)
