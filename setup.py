"""Packaging of fastar. `make install` is the way in, because FFCV has to be built (tools/build_ffcv.sh)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fastar",
    version="0.1.0",
    description="Find star models of neural networks and measure linear mode connectivity, fast",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastar", "fastar.*"]), "fastar.kernels", "fastar.configs"],
    package_dir={"fastar": "fastar", "fastar.kernels": "kernels", "fastar.configs": "configs"},
    package_data={"fastar": ["py.typed"], "fastar.configs": ["*.yaml"]},
    install_requires=[
        "ffcv==1.0.2",
        "filelock>=3.30",
        "lapjv>=1.3.29",
        "matplotlib>=3.8",
        "numba>=0.60",
        "numpy>=1.26",
        "pillow>=10",
        "psutil>=5.9",
        "pydantic>=2.7",
        "PyYAML>=6",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "setuptools>=70",  # FFCV imports distutils
        "tensorboardX>=2.6.2",
        "torch>=2.11,<2.15",
        "triton>=3.5; platform_system == 'Linux'",
        "typer>=0.16",
    ],
    extras_require={
        "figures": ["tensorboard>=2.16"],  # shows the event files
        "test": ["pytest>=8", "tensorboard>=2.16", "torchvision>=0.26"],
        "check": ["mypy>=1.11", "ruff>=0.9", "types-PyYAML"],
        "bench": ["rebasin==0.0.47"],
    },
    entry_points={"console_scripts": ["fastar = fastar.cli.main:main"]},
)
