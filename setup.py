"""Packaging of fastar. `make install` installs everything, FFCV too, which has to be built (tools/build_ffcv.sh);
`pip install .` takes only packages that have wheels."""

from pathlib import Path

from setuptools import find_packages, setup

# lapjv and Triton where they have wheels; SciPy and plain torch stand in (`fastar doctor` says so).
HAS_LAPJV = (
    "python_version < '3.12' and (platform_system == 'Linux' and platform_machine == 'x86_64'"
    " or platform_system == 'Windows' and platform_machine == 'AMD64')"
)
HAS_TRITON = "platform_system == 'Linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"

setup(
    name="fastar",
    version="0.1.0",
    description="Find star models of neural networks and measure linear mode connectivity, fast",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        *(f"Operating System :: {system}" for system in ("POSIX :: Linux", "MacOS", "Microsoft :: Windows")),
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["fastar", "fastar.*"]), "fastar.kernels", "fastar.configs"],
    package_dir={"fastar": "fastar", "fastar.kernels": "kernels", "fastar.configs": "configs"},
    package_data={
        "fastar": ["py.typed"],
        "fastar.config": ["paper.yaml"],
        "fastar.configs": ["*.yaml"],
        "fastar.report.page": ["page.css", "page.js"],
    },
    install_requires=[
        "filelock>=3.30",
        f"lapjv==1.3.27; {HAS_LAPJV}",
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
        "tensorboardX>=2.6.2",
        "torch>=2.11,<2.15",
        f"triton>=3.5; {HAS_TRITON}",
        "typer>=0.16",
    ],
    extras_require={
        "ffcv": ["ffcv==1.0.2", "setuptools>=70"],  # it imports distutils
        "ray": ["ray>=2.40"],
        "slurm": ["submitit>=1.5"],
        "figures": ["tensorboard>=2.16"],  # shows the event files
        "test": ["pytest>=8", "ray>=2.40", "submitit>=1.5", "tensorboard>=2.16", "torchvision>=0.26"],
        "check": ["mypy>=1.11", "ruff>=0.9", "types-PyYAML"],
        "bench": ["rebasin==0.0.47"],
    },
    entry_points={"console_scripts": ["fastar = fastar.cli.main:main"]},
)
