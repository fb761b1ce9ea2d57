"""Packaging of fastar; `make install` is the supported way in, because FFCV has to be built (see tools/build_ffcv.sh)."""

from setuptools import setup

ROOMS = [
    "fastar",
    "fastar.models",
    "fastar.data",
    "fastar.matching",
    "fastar.evaluation",
    "fastar.training",
    "fastar.experiments",
]

setup(
    name="fastar",
    version="0.1.0",
    description="Find star models of neural networks and measure linear mode connectivity, fast",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*ROOMS, "fastar.kernels"],
    package_dir={"fastar": "fastar", "fastar.kernels": "kernels"},
    package_data={"fastar": ["py.typed"]},
    install_requires=[
        "ffcv==1.0.2",
        "lapjv>=1.3.29",
        "matplotlib>=3.8",
        "numba>=0.60",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.7",
        "PyYAML>=6",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "torch>=2.11,<2.15",
        "triton>=3.5; platform_system == 'Linux'",
        "typer>=0.16",
    ],
    extras_require={
        "test": ["pytest>=8"],
        "check": ["mypy>=1.11", "ruff>=0.9", "types-PyYAML"],
        "bench": ["rebasin==0.0.47"],
    },
    entry_points={"console_scripts": ["fastar = fastar.cli:main"]},
)
