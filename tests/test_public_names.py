"""What programs of users import by name: each name stays where version 0.1 had it.

The table is written by hand. Names may be added; one goes only with a new major version.
"""

from __future__ import annotations

from importlib import import_module

import pytest

# Everything in the packages' `__all__`.
PACKAGES = {
    "enn_core": """
        ConversionError ConversionReport CutError ENNConv1d ENNConv2d ENNConv3d ENNLinear
        FactorError LocalBlock LocalTrainer Pipeline PipelineError Retraction conversion_report cut
        fuse local_blocks make_head orthogonality_error orthogonality_penalty param_groups retract_
        svd_factors to_enn
    """,
    "enn_core.feedback": """
        TEACH Event Journal JournalBusy JournalCorrupt JournalError JournalMismatch JournalMissing
        Profile RecursiveProjector RidgeAdapter Writing latest
    """,
    "enn_core.loco": """
        LOCO PROJECTIONS Estimate InputProjection Perturbation Stage UnsupportedModel calibrate_
        perturb to_stages
    """,
    "enn_core.rules": "RULES Entry Rule RuleError make_rule rule_options",
    "retrieval": """
        DatasetError Effect EigenBasis EigenIndex HistoryEntry Hit ImageError Lesson ModelError
        ProfileError QueryError RetrievalModel Searcher TeachError Teacher default_index_dir
        list_models list_profiles load load_karpathy open_dataset open_index parse_query
        rank_captions
    """,
    "neuro": """
        BiasCorrection BrainAge BrainAgeModel BrainDataset Calibration Estimate Flag
        IntensityReference Outcome Prepared Preprocessor Quality Scan ScanError Seen Site
        TrainConfig Volume VolumeError find_scans fit judge prepare_all prepare_scan read_volume
        save_picture to_native write_bundle
    """,
}
# What docs/python.md and README.md import beyond that, and what MONAI bundles name that
# `write_bundle` wrote.
MODULES = {
    "enn_core.local": "adamw plot_losses",
    "retrieval.search": "rank_captions",
    "retrieval.datasets": "load_karpathy",
    "retrieval.evaluate": "evaluate write_result",
    "neuro.bundle": "AgeTable BrainAgeNetwork PrepareBrain list_scans",
}


@pytest.mark.parametrize(
    ("module", "names"), [*PACKAGES.items(), *MODULES.items()], ids=[*PACKAGES, *MODULES]
)
def test_every_name_is_imported_from_its_place(module: str, names: str) -> None:
    if module.startswith("retrieval"):
        pytest.importorskip("faiss")
    if module.startswith("neuro"):
        pytest.importorskip("nibabel")
    home = import_module(module)
    assert [name for name in names.split() if not hasattr(home, name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_says_less_than_before(package: str) -> None:
    assert set(PACKAGES[package].split()) <= set(import_module(package).__all__)
