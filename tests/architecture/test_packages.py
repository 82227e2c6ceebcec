"""The import name `kernels` is also another distribution's: ours must be the one that is found."""

import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT

import deployments
import kernels
import serve_app
from serve_app.__main__ import EXPECTED_ABI, check_kernels


@pytest.mark.parametrize("package", PACKAGES)
def test_only_our_distribution_brings_the_package(package: str) -> None:
    # An editable install lists none.
    assert set(packages_distributions().get(package, ["sirocco"])) == {"sirocco"}


def test_the_packages_lie_side_by_side() -> None:
    places = {Path(str(package.__file__)).resolve().parent.parent for package in (serve_app, deployments, kernels)}
    assert len(places) == 1


def test_kernels_has_an_interface_number_and_no_version() -> None:
    assert isinstance(kernels.ABI, int)
    assert kernels.ABI == EXPECTED_ABI
    assert not hasattr(kernels, "__version__")
    check_kernels()


def test_the_wheel_ships_the_three_packages_and_nothing_else() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    assert sorted(build["wheel"]["packages"]) == sorted(PACKAGES)
    assert build["overrides"] == [{"if": {"failed": True}, "wheel": {"cmake": False}}]


def test_no_dependency_is_the_other_kernels() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = config["project"]
    groups = [*project["optional-dependencies"].values(), *config["dependency-groups"].values()]
    needs = [*project["dependencies"], *(need for group in groups for need in group)]
    names = {need.split(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip() for need in needs}
    assert not names & {"kernels", "deployments", "serve-app", "serve_app"}
