"""Who may import whom: the order of the modules, and the one door of each outside library."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path

import pytest
from support.processes import Processes

ROOT = Path(__file__).parents[2]

# The rooms of each package and their modules, from the ground up ("": the package's own folder). A module imports only
# modules that stand before it, and of other rooms only what `CLOSED` leaves open. A new file joins its room's list, or
# it does not belong yet.
Rooms = tuple[tuple[str, tuple[str, ...]], ...]

ROOMS: dict[str, Rooms] = {
    "featstore": (
        (
            "",
            (
                "remedies", "errors", "words", "notes", "html", "timing", "digest", "machine", "objects", "source_code",
                "surroundings", "plugins",
            ),
        ),
        (
            "files",
            (
                "storage_types", "scaled", "disk", "plain_reads", "header", "hdf5", "part", "table", "index", "reading",
                "provenance",
            ),
        ),
        (
            "images",
            (
                "names", "decoders", "headers", "jpeg", "decode", "pixel_digest", "digests", "hashing", "sources",
                "object_source", "item_sources", "labels", "found", "folders", "parquet_tables", "csv_tables",
                "tables", "tar_shards", "datasets", "splitting", "image_set", "fileless", "contents", "origins",
                "geometry", "draws", "parameters", "warps", "levels", "filters", "canvas", "policies", "spelling",
                "augmentation", "views", "render", "processes",
            ),
        ),
        (
            "models",
            (
                "names", "modes", "kept", "wrappers", "adapters", "tracing", "graph", "pool", "digests", "stages",
                "shapes", "staged", "layer_groups", "compiled", "trunk", "weights", "runs", "trust",
                "torchvision_models", "timm_models", "own_file", "backbones", "probe", "batch_mixing", "purity",
            ),
        ),
        (
            "store",
            (
                "spec", "access", "folders", "features", "near_duplicates", "part_facts", "sets", "image_tables",
                "catalogue", "verification", "compaction", "removal", "garbage", "difference", "refusals", "store",
                "gathering",
            ),
        ),
        (
            "extraction",
            (
                "defaults", "remedy", "shards", "pixels", "plan", "rates", "narrowing", "rounding", "lowering",
                "opened", "filed", "progress", "failures", "job", "opening", "estimate", "ray_actors", "extract",
                "adopt", "map_batches",
            ),
        ),
        ("exchange", ("names", "checksums", "feature_files", "export", "imports")),
        ("pages", ("captions", "projection", "neighbours", "thumbnails", "figures", "page", "store_pages", "server")),
        ("", ("__init__",)),
        ("cli", ("program", "flags", "models", "store", "exchange", "backbones", "doctor", "view", "app")),
        ("", ("__main__",)),
    ),
    "training": (
        ("", ("frames", "choices", "plots", "schedules", "standardised", "heads", "mixing", "sidecar")),
        (
            "scores",
            (
                "metrics", "scored_table", "transferability", "class_report", "outcomes", "suspects", "significance",
                "calibration", "class_counts",
            ),
        ),
        ("solvers", ("rows", "targets", "newton", "logistic", "neighbors", "moments", "ridge", "class_means")),
        ("inputs", ("situation", "search", "explain", "held", "derive", "resident", "batches")),
        (
            "loop",
            (
                "monitor", "history", "optim", "interrupts", "copies", "averages", "losses", "ranks", "steps", "fit",
                "batch_norm", "checkpoints", "lr_find", "settings", "plan", "fitting", "packed",
            ),
        ),
        (
            "",
            (
                "trackers", "class_tables", "splits", "agreement", "predict", "tta", "placement", "embedding",
                "provenance", "row_fits", "saved", "export", "hub", "learner", "ensembles", "recipes",
                "cross_validation",
            ),
        ),
        ("estimators", ("given", "heads", "probes", "extractor")),
        (
            "experiments",
            (
                "probing", "registry", "comparing", "grid", "sweep_folder", "swept", "trials", "sweeps",
                "report_sections", "reports", "shots", "ray_shares",
            ),
        ),
        (
            "cli",
            (
                "fit_flags", "asked", "config", "run_commands", "head_flags", "calibrate", "lr_find", "runs", "versus",
                "compare", "few_shot", "sweep", "report", "app",
            ),
        ),
        ("", ("__init__", "__main__")),
    ),
}  # fmt: skip

# Rooms of featstore that may not use each other, though one of them stands before the other.
CLOSED = {
    ("images", "files"), ("models", "files"), ("exchange", "extraction"),
    ("pages", "models"), ("pages", "extraction"), ("pages", "exchange"),
}  # fmt: skip

# Outside library -> the only modules that may import it.
DOORS = {
    "h5py": {"featstore.files.hdf5"},
    "PIL": {"featstore.images.decode"},
    "simplejpeg": {"featstore.images.jpeg"},
    "datasets": {"featstore.images.datasets"},
    "pillow_heif": {"featstore.images.decode"},
    "torchvision.io": {"featstore.images.jpeg"},
    "torchcodec": {"featstore.images.jpeg"},
    "torchvision.models": {"featstore.models.torchvision_models"},
    "timm": {"featstore.models.timm_models"},
    "ray": {"featstore.extraction.ray_actors"},
    "safetensors": {
        "featstore.models.weights",
        "featstore.models.runs",
        "featstore.exchange.feature_files",
        "training.export",
    },
    "pyarrow": {"featstore.exchange.export", "featstore.images.parquet_tables"},
    "torch.distributed": {"training.loop.ranks"},
    "typer": {
        "featstore.cli.program",
        "featstore.cli.flags",
        "featstore.cli.models",
        "featstore.cli.store",
        "featstore.cli.exchange",
        "featstore.cli.backbones",
        "featstore.cli.view",
        "featstore.cli.app",
        "training.cli.fit_flags",
        "training.cli.config",
        "training.cli.run_commands",
        "training.cli.head_flags",
        "training.cli.lr_find",
        "training.cli.sweep",
        "training.cli.report",
        "training.cli.calibrate",
        "training.cli.runs",
        "training.cli.compare",
        "training.cli.versus",
        "training.cli.app",
        "training.cli.few_shot",
    },
    "matplotlib": {"training.plots"},
    "pandas": {"training.frames"},
    "plotly": {"featstore.pages.figures"},
    "starlette": {"featstore.pages.server"},
    "uvicorn": {"featstore.pages.server"},
    "umap": {"featstore.pages.projection"},
    "obstore": {"featstore.objects"},
    "onnxruntime": {"training.export"},
    "torch.utils.tensorboard": {"training.trackers"},
    "wandb": {"training.trackers"},
    "mlflow": {"training.trackers"},
    "trackio": {"training.trackers"},
    "huggingface_hub": {"featstore.models.timm_models", "featstore.cli.doctor", "training.hub"},
}

# What training uses of featstore: module -> names. docs/design.md says what may join it.
SURFACE: dict[str, str] = {
    "__init__": "__version__",
    "cli.flags": (
        "AugmentFlags ComputeFlags GivenImages ImageFlags OutputFlags RunFlags SetFlags StoreOption TrustOption "
        "ViewFlags open_store parse_numbers spread"
    ),
    "cli.models": "ModelFlags ModelsFlags load_model",
    "cli.program": "new_app one_of run show show_json table tell tell_all",
    "digest": "Json canonical_json digest_bytes digest_json digest_tensor",
    "errors": (
        "AmbiguousRequestError DamagedFileError FactsDifferError FeatureStoreError ImageError MissingFeaturesError "
        "ModelError OnError check_choice"
    ),
    "extraction.defaults": "DEFAULT_SPLIT_SEED DEFAULT_VALID",
    "extraction.extract": "extract run_plan",
    "extraction.plan": "Plan PlannedSet plan",
    "extraction.progress": "bar_class",
    "extraction.ray_actors": "Ray joined",
    "extraction.remedy": "extract_remedy seed_ranges",
    "extraction.shards": "local_device local_threads local_workers shard_of",
    "files.disk": "make_folder whole_or_nothing write_at",
    "files.storage_types": "DEFAULT_STORAGE_TYPE STORAGE_TYPES",
    "html": "MOST_ROWS titled_table",
    "images.contents": "is_changed overlap_note",
    "images.digests": "Digests KnownDigest KnownDigests",
    "images.fileless": "images_by_id",
    "images.image_set": "ImageSet",
    "images.item_sources": "content_of described",
    "images.labels": "checked_groups composed_classes",
    "images.names": "IMAGE_SUFFIXES SPLITS Task",
    "images.origins": "TWO_VALUES as_cells made_by named_by",
    "images.pixel_digest": "check_pixels",
    "images.render": "Job doubts_note render",
    "images.sources": "AbsentSource FolderSource",
    "images.spelling": "completed",
    "images.splitting": "fold_of_each",
    "images.views": "Augment GivenPolicy View",
    "machine": "available_bytes num_processors",
    "models.backbones": "architecture backbone class_names is_named restored",
    "models.digests": "module_digest",
    "models.layer_groups": "LayerGroup layer_groups",
    "models.modes": "check_trainable eval_mode mode_of numerics one_pass",
    "models.names": "Batching DEFAULT_PRECISION PRECISIONS Precision REDUCTIONS",
    "models.pool": "Pool",
    "models.probe": "check_probe take_probes",
    "models.runs": "FACTS Run check_free located new_folder new_run read_facts read_file read_run write_run",
    "models.staged": "StagedModel",
    "models.stages": "HeadStage PoolStage Stage has_weights",
    "models.trunk": "Output Trunk choose_device default_batch_size",
    "models.weights": "read_tensors",
    "notes": "logger_of",
    "pages.captions": "groups_of label_of",
    "pages.figures": "confusion curves point_map reliability",
    "pages.neighbours": "as_blocks nearest",
    "pages.page": "Block Drawing Gallery Page Pictures Section Table",
    "pages.projection": "Method Projection projected",
    "pages.thumbnails": "thumbnails",
    "remedies": "Call Command Remedy Steps",
    "source_code": "class_facts closure_of function_facts is_from_library",
    "store.features": "Features",
    "store.part_facts": "are_stages stage_facts",
    "store.sets": "FeatureRequest FeatureSet",
    "store.spec": "FeatureSpec",
    "store.store": "FeatureStore",
    "words": "counted printable size_text some",
}

IMPORT_BY_VARIABLE = {"featstore.__init__", "training.__init__", "featstore.exchange.export"}
"""The fronts import what is asked of them, and an export the library that its format needs."""

SAYS_NOTHING = {"utils", "util", "helpers", "manager", "base", "misc", "common"}


def order(package: str) -> list[str]:
    """The modules of a package from the ground up, without its name: ``views.View`` is in ``images.views``."""
    return [f"{room}.{name}".removeprefix(".") for room, names in ROOMS[package] for name in names]


def room(module: str) -> str:
    """The room that a module, without its package's name, is in; empty for the package's own folder."""
    return module.rpartition(".")[0]


def faults(module: str, source: str) -> list[str]:
    """What `source`, as the text of the module `module` ("featstore.images.views"), may not use: a sentence each."""
    package, _, name = module.partition(".")
    found = {}
    for line, used in names_used(module, source):
        owner, _, rest = used.partition(".")
        if owner == package:
            target = target_in(package, rest)
            if target not in order(package):
                found[used] = f"line {line}: {module} uses {used}, and a room is no module: name the one in it"
            elif order(package).index(target) >= order(package).index(name):
                found[used] = f"line {line}: {module} uses {used}, which doesn't stand before it in the order"
            elif (room(name), room(target)) in CLOSED:
                found[used] = f"line {line}: {module} uses {used}, but {room(name)} knows nothing of {room(target)}"
        elif owner == "training":
            found[used] = f"line {line}: {module} uses {used}, but featstore knows nothing of training"
        elif owner == "featstore" and any(part.startswith("_") and not is_dunder(part) for part in rest.split(".")):
            found[used] = f"line {line}: {module} uses {used}, which isn't public"
        for library, doors in DOORS.items():
            if is_of(library, used) and module not in doors:
                found[used] = (
                    f"line {line}: {module} uses {used}; the door of {library} is {' or '.join(sorted(doors))}"
                )
    return list(found.values())


def is_of(library: str, used: str) -> bool:
    return f"{used}.".startswith(f"{library}.")


def target_in(package: str, used: str) -> str:
    """The module that a dotted name below `package` is in; a room's own name where it names no module of the room."""
    first, second, *_ = [*used.split("."), "", ""]
    rooms = {name for name, _ in ROOMS[package]} - {""}
    if first in rooms:
        return f"{first}.{second}" if f"{first}.{second}" in order(package) else first
    return first if first in order(package) else "__init__"


def names_used(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that `source` imports, anywhere in it, and takes from imported modules."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}  # name in the file -> what was imported under it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound |= {alias.asname: alias.name} if alias.asname else {(top := alias.name.partition(".")[0]): top}
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{origin(module, node)}.{alias.name}"
                bound[alias.asname or alias.name] = full
                yield node.lineno, full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in bound:
                yield node.lineno, f"{bound[root]}.{rest}"
        elif isinstance(node, ast.Call) and _imports(ast.unparse(node.func), bound):
            literals = [each.value for each in node.args if isinstance(each, ast.Constant)]
            if len(node.args) == len(literals) == 1 and not node.keywords and not str(literals[0]).startswith("."):
                yield node.lineno, str(literals[0])
            elif module not in IMPORT_BY_VARIABLE:
                yield node.lineno, f"{module.partition('.')[0]}.{ast.unparse(node)}"


def _imports(called: str, bound: Mapping[str, str]) -> bool:
    """Whether what is called imports a module by its name."""
    root, dot, rest = called.partition(".")
    return f"{bound.get(root, root)}{dot}{rest}" in {"importlib.import_module", "importlib.__import__", "__import__"}


def origin(module: str, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names; a dot stands for the room of `module`, two for what holds it."""
    here = module.split(".")[: -node.level] if node.level else []
    return ".".join([*here, *([node.module] if node.module else [])])


def surface() -> dict[str, set[str]]:
    """The names that training imports from each module of featstore, without the package's name."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        for _, used in names_used(module, path.read_text()) if module.startswith("training.") else ():
            owner, _, rest = used.partition(".")
            if owner == "featstore":
                target = target_in(owner, rest)
                found.setdefault(target, set()).add(rest.removeprefix(f"{target}.").partition(".")[0])
    return found


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def modules() -> Mapping[str, Path]:
    files = [path for package in ROOMS for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def room_pages() -> dict[str, Path]:
    """The `__init__.py` of each room."""
    return {
        f"{package}.{name}.__init__": ROOT / package / name / "__init__.py"
        for package, rooms in ROOMS.items()
        for name in sorted({name for name, _ in rooms} - {""})
    }


@pytest.mark.parametrize("module", sorted(modules().keys() - room_pages().keys()))
def test_a_module_uses_only_what_stands_before_it_and_no_library_but_through_its_door(module: str) -> None:
    assert not faults(module, modules()[module].read_text())


def test_a_file_of_more_than_600_lines_says_why() -> None:
    folders = [ROOT / name for name in (*ROOMS, "tests", "scripts")]
    long = [file for folder in folders for file in folder.rglob("*.py") if len(file.read_text().splitlines()) > 600]
    reasons = [ast.get_docstring(ast.parse(file.read_text())) or "" for file in long]
    assert not [file for file, reason in zip(long, reasons, strict=True) if "\nLong, since " not in reason]


def test_no_two_files_of_tests_are_modules_of_one_name() -> None:
    """Of which pytest, run over both, loads one."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


def test_somebody_goes_through_each_door() -> None:
    used = {module: {used for _, used in names_used(module, path.read_text())} for module, path in modules().items()}
    unused = {
        library: nobody
        for library, doors in DOORS.items()
        if (nobody := {door for door in doors if not any(is_of(library, name) for name in used.get(door, ()))})
    }
    assert not unused


def test_each_file_stands_in_the_order() -> None:
    expected = {f"{package}.{name}" for package in ROOMS for name in order(package)}
    assert set(modules()) == expected | set(room_pages())
    assert not SAYS_NOTHING & {module.rpartition(".")[2] for module in expected}


def test_training_uses_of_featstore_just_the_listed_surface() -> None:
    listed = {module: set(names.split()) for module, names in SURFACE.items()}
    assert surface() == listed
    assert list(SURFACE) == sorted(SURFACE)
    assert all(names.split() == sorted(names.split()) for names in SURFACE.values())


@pytest.mark.parametrize("page", room_pages())
def test_a_room_says_what_it_is_for_and_hides_no_module(page: str) -> None:
    tree = ast.parse(room_pages()[page].read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("featstore.images.views", "import training", "training"),
        ("featstore.cli.app", "from training.heads import build_head", "training.heads.build_head"),
        ("featstore.images.views", "import featstore.models.staged", "featstore.models.staged"),
        (
            "featstore.images.views",
            "from featstore.models.staged import StagedModel",
            "featstore.models.staged.StagedModel",
        ),
        ("featstore.images.views", "from featstore.models import staged", "featstore.models.staged"),
        ("featstore.images.views", "from ..models.staged import StagedModel", "featstore.models.staged.StagedModel"),
        ("featstore.images.views", "from ..models import staged", "featstore.models.staged"),
        ("featstore.images.views", "from featstore import View", "featstore.View"),
        ("featstore.images.views", "from featstore.images.views import View", "featstore.images.views.View"),
        (
            "featstore.images.views",
            "def later():\n    from featstore.store.store import FeatureStore",
            "featstore.store.store.FeatureStore",
        ),
        ("featstore.images.views", "if TYPE_CHECKING:\n    import featstore.store.store", "featstore.store.store"),
        (
            "featstore.images.views",
            "import importlib\nimportlib.import_module('featstore.store.store')",
            "featstore.store",
        ),
        ("featstore.images.views", "__import__('featstore.store.store')", "featstore.store.store"),
        (
            "featstore.images.views",
            "from importlib import import_module as load\nload('featstore.store.store')",
            "feat",
        ),
        ("featstore.images.views", "import importlib\nimportlib.import_module(name='featstore.store')", "featstore."),
        ("featstore.images.views", "from importlib import import_module as load\nload('.store', 'featstore')", "feat"),
        ("featstore.images.views", "from importlib import import_module as load\nload(NAME)", "featstore.load(NAME)"),
        ("featstore.extraction.extract", "import featstore\nfeatstore.cli.app.main()", "featstore.cli.app.main"),
        ("training.heads", "from training.learner import Learner", "training.learner.Learner"),
        ("training.heads", "from featstore.models.staged import _listed", "featstore.models.staged._listed"),
        (
            "training.heads",
            "from featstore.models import staged\nstaged._x([])",
            "featstore.models.staged._x",
        ),
        ("training.heads", "import featstore.models.staged as s\ns._listed([])", "featstore.models.staged._listed"),
        (
            "featstore.images.render",
            "import featstore.images",
            "featstore.images",
        ),
        ("featstore.images.views", "from featstore.files.part import Part", "featstore.files.part.Part"),
        ("featstore.exchange.export", "from featstore.extraction.extract import plan", "featstore.extraction.extract"),
        ("featstore.store.store", "import h5py", "h5py"),
        ("training.learner", "import h5py as h", "h5py"),
        ("featstore.images.render", "from PIL import Image", "PIL.Image"),
        ("featstore.images.render", "import simplejpeg", "simplejpeg"),
        ("featstore.images.render", "from torchvision.io import decode_image", "torchvision.io.decode_image"),
        ("featstore.images.render", "from torchvision import io", "torchvision.io"),
        (
            "featstore.images.render",
            "import torchvision\ntorchvision.io.decode_image(x)",
            "torchvision.io.decode_image",
        ),
        ("featstore.models.staged", "from torchvision.models import resnet18", "torchvision.models.resnet18"),
        ("featstore.models.staged", "import torchvision as tv\ntv.models.get_model(x)", "torchvision.models.get_model"),
        ("training.learner", "def plot():\n    import matplotlib.pyplot as plt", "matplotlib.pyplot"),
        ("featstore.store.store", "from safetensors.torch import save_file", "safetensors.torch.save_file"),
        ("featstore.extraction.extract", "import typer", "typer"),
        ("training.learner", "import typer", "typer"),
    ],
)
def test_what_is_forbidden_is_named(module: str, source: str, named: str) -> None:
    sentences = faults(module, source)
    assert any(f" {named}" in sentence for sentence in sentences), sentences


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "featstore.images.views",
            "import torch.nn.functional as F\nfrom featstore.digest import Json\nF.pad(Json)",
        ),
        ("featstore.cli.app", "from featstore import __version__"),
        ("featstore.models.torchvision_models", "import torchvision\ntorchvision.models.get_model(name)"),
        ("featstore.files.hdf5", "import h5py\nh5py.File(path)"),
        ("training.learner", "from featstore import StagedModel\nfrom featstore.models.modes import mode_of"),
        ("training.loop.lr_find", "def plot():\n    from training.plots import learning_rates"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert not faults(module, source)


def test_importing_featstore_loads_neither_torch_nor_arrays_nor_plots_nor_the_command_line(
    new_processes: Processes,
) -> None:
    program = "import featstore, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(new_processes.answer(program).split())
    assert "featstore" in loaded
    assert not loaded & {"matplotlib", "numpy", "sklearn", "torch", "typer", "training"}


def test_a_wheel_holds_just_the_two_packages(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("featstore", "training", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools.build_meta import build_wheel; build_wheel('made')"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = (tmp_path / "made").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"featstore", "training"}
    expected = {str(path.relative_to(ROOT)) for path in modules().values()}
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"featstore/py.typed", "training/py.typed"} <= set(names)
    assert {"featstore/pages/page.css", "featstore/pages/page.js"} <= {*names}
    samples = {str(path.relative_to(ROOT)) for path in (ROOT / "featstore/images/samples").iterdir()}
    assert samples == {name for name in names if "/samples/" in name}


def test_the_design_page_lists_the_modules_in_their_order() -> None:
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    block = page.partition("```\n")[2].partition("```")[0]
    listed: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    package, here, names = "", "", list[str]()
    for line in [*block.splitlines(), "./"]:
        first, *more = re.split(r"\s{2,}", line.strip())  # then what it is for, which is no name
        if not first.endswith("/"):
            known = {name for room, group in ROOMS[package] if room == here for name in group}
            assert first in known, f"{package}/{here} has no module {first}"
            names += takewhile(known.__contains__, [first, *more])
            continue
        if names:
            listed[package].append((here, tuple(names)))
        names, here = [], first.removesuffix("/").removeprefix(".")
        if here in ROOMS:
            package, here = here, ""
            listed[package] = []
    for package, rooms in ROOMS.items():
        shown = [(name, tuple(each for each in group if not is_dunder(each))) for name, group in rooms]
        assert listed[package] == [each for each in shown if each[1]]
