"""Images, sounds and videos of a request: read, counted in tokens, and encoded for the decoder.

>>> media = Media(bundle, 3072, 4, tokenizer.special_tokens)  # doctest: +SKIP
>>> (crops,) = media.read(MediaPart("image", "photo.jpg", "image 1"), None)  # doctest: +SKIP
>>> media.encode(crops).shape  # doctest: +SKIP
(545, 3072)

Reading is cheap and tells how many tokens a part takes; encoding is not, and is left out for what is still in a cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phi4edge.bundle import AUDIO as AUDIO_ROLE
from phi4edge.bundle import MANIFEST, VISION, Bundle
from phi4edge.encoders import AudioEncoder, Branch, FreeMemory, VisionEncoder, check_provider
from phi4edge.errors import BundleError, InputError, OutOfMemoryError, UnsupportedError
from phi4edge.media_cache import Latest, digest_of, part_key
from phi4edge.media_source import NOUNS, check_total, is_path
from phi4edge.prompt import MAX_FRAMES, MediaPart
from phi4edge.providers import AUTO, check_name
from phi4edge.router import AUDIO, IMAGE

if TYPE_CHECKING:
    from phi4edge.audio_processor import AudioNumbers
    from phi4edge.image_processor import Crops, ImageNumbers

VIDEO = "video"  # its frames are images from here on
MAX_PARTS = 16  # images, as many sounds, and as many videos, in one conversation
CACHE_BYTES = 64 << 20  # of embeddings; an image of 1344 x 1344 pixels takes 31 MiB
KNOWN_ITEMS = 1024  # images, sounds and frames of which the sizes are kept, so that they need not be read again

Float32 = npt.NDArray[np.float32]
Progress = Callable[[int, int], bool | None]  # (crops or tokens done, in all); False cancels
_ROLES = {IMAGE: VISION, AUDIO: AUDIO_ROLE}


@dataclass(frozen=True, slots=True)
class MediaInput:
    """An image or a sound as its encoder takes it, or what is known of it since it was read before."""

    kind: str
    label: str  # such as "image 1", or "video 1, frame 3"
    n_tokens: int
    digest: bytes  # of all that its embeddings depend on
    data: Crops | Float32 | None
    branch: Branch | None
    again: Callable[[], MediaInput] | None = field(default=None, repr=False, compare=False)  # reads it, with its data

    def without_data(self) -> MediaInput:
        """Its size alone; large images take memory."""
        return replace(self, data=None, again=None)

    def with_data(self) -> MediaInput:
        """Read again if it has none."""
        return self if self.data is not None or self.again is None else self.again()


@dataclass(frozen=True)
class MediaInputs:
    """All media of a prompt, in the order of their tokens."""

    items: list[MediaInput]
    n_frames: dict[str, int]  # of videos that have fewer than were asked for, by the field of their MediaPart
    warnings: tuple[str, ...]  # for people

    @property
    def sizes(self) -> str:
        """What each part takes, all frames of a video together, as the end of a sentence."""
        totals: dict[str, int] = {}
        for item in self.items:
            label = item.label.partition(",")[0]
            totals[label] = totals.get(label, 0) + item.n_tokens
        return "".join(f", {label} takes {total}" for label, total in totals.items())


@dataclass(frozen=True, slots=True)
class EncoderRun:
    """What ran an encoder, and what there is to tell about it."""

    provider: str
    warnings: tuple[str, ...]


class Media:
    """What a bundle needs for images and sounds.  Encoders are opened on first use, and kept until :meth:`release`.

    bundle: None for a model file alone, which takes no media.  provider: what runs the encoders, "auto" or a name in
    ``providers.PROVIDERS``.  free_memory: tells how many bytes there are for an encoder; None is enough.

    Raises BundleError for numbers or placeholders of the manifest that cannot be meant, UsageError and UnsupportedError
    for a provider.
    """

    def __init__(
        self,
        bundle: Bundle | None,
        hidden_size: int,
        threads: int,
        special_tokens: Mapping[str, int] | None = None,
        *,
        provider: str = AUTO,
        free_memory: FreeMemory | None = None,
    ) -> None:
        self._bundle = bundle
        self._hidden_size = hidden_size
        self._options: dict[str, Any] = {"threads": threads, "provider": provider, "free_memory": free_memory}
        self._encoders: dict[str, VisionEncoder | AudioEncoder] = {}
        self._cache = _new_cache()
        self._known: Latest[list[MediaInput]] = Latest(KNOWN_ITEMS, len)  # without their data
        self._numbers: dict[str, Any] = {}
        self.kinds = kinds_of(bundle)
        self.placeholders = {} if bundle is None else _placeholders(bundle, self.kinds, special_tokens or {})
        if self.kinds:
            check_provider(provider)
        else:
            check_name(provider)
        self._check_files()

    def require(self, parts: Sequence[MediaPart]) -> None:
        """InputError for media that this model cannot take, or too many of them; nothing is opened for that."""
        for kind, noun in NOUNS.items():
            theirs = [part for part in parts if part.kind == kind]
            if theirs and theirs[0].placeholder not in self.kinds:
                raise no_encoder(kind, self._bundle)
            counts = [(len(theirs), noun, MAX_PARTS)]
            if kind == VIDEO:
                counts.append((sum(part.n_items for part in theirs), "frames of videos", MAX_FRAMES))
            for n_found, what, n_allowed in counts:
                if n_found > n_allowed:
                    raise InputError(
                        f"the conversation has {n_found} {what}, and {n_allowed} are allowed", hint="begin a new one"
                    )
        check_total(parts)

    def read_all(
        self, parts: Sequence[MediaPart], branch: Branch | None, max_crops: int | None, room: int
    ) -> MediaInputs:
        """As :meth:`read`, for a prompt with room for so many tokens of media: what is beyond keeps its size alone."""
        items: list[MediaInput] = []
        n_frames: dict[str, int] = {}
        warnings: list[str] = []
        for part in parts:
            found = self.read(part, branch, max_crops)
            for item in found:
                room -= item.n_tokens
                items.append(item if room > 0 else item.without_data())  # the prompt will be refused
            if len(found) < part.n_items:
                n_frames[part.field] = len(found)
                if part.frames is not None:
                    warnings.append(f"{part.label} has {len(found)} frames to take, and {part.frames} were asked for")
        return MediaInputs(items, n_frames, tuple(warnings))

    def read(self, part: MediaPart, branch: Branch | None, max_crops: int | None = None) -> list[MediaInput]:
        """Decodes an image, a sound or a video and computes what the encoder takes; of a video, for each frame.

        What was read before, and is the same, comes without its data: :meth:`encode` reads it again if it must.

        branch: the projector for a sound.  max_crops: at most so many crops for an image, or for all frames of a video,
        of which each has one at least; None is what the model knows.

        Raises FileError, InputError, UnsupportedError, BundleError, OutOfMemoryError.
        """
        key = part_key(part, branch, max_crops)
        known = None if key is None else self._known.get(key)
        if known is not None:
            again = _Again(part, known, partial(self._read, part, branch, max_crops))
            return [
                replace(item, label=part.label + item.label, again=partial(again.item, i))
                for i, item in enumerate(known)
            ]
        items = self._read(part, branch, max_crops)
        if key is not None and (not is_path(part.source) or key == part_key(part, branch, max_crops)):
            sizes = [item.without_data() for item in items]
            self._known.put(key, [replace(item, label=item.label.removeprefix(part.label)) for item in sizes])
        return items

    def _read(self, part: MediaPart, branch: Branch | None, max_crops: int | None) -> list[MediaInput]:
        try:
            if part.kind == VIDEO:
                return self._read_video(part, max_crops)
            return [self._read_image(part, max_crops) if part.kind == IMAGE else self._read_sound(part, branch)]
        except (InputError, UnsupportedError, OutOfMemoryError) as error:
            raise type(error)(error.problem, **_place(part), hint=error.hint) from error

    def _read_image(self, part: MediaPart, max_crops: int | None) -> MediaInput:
        from phi4edge.image_processor import load_image, process_image

        crops = process_image(load_image(part.source), self._image_numbers(), max_crops)
        digest = digest_of(IMAGE, crops.pixel_values, crops.patch_mask, np.array(crops.grid))
        return MediaInput(IMAGE, part.label, crops.n_tokens, digest, crops, None)

    def _read_video(self, part: MediaPart, max_crops: int | None) -> list[MediaInput]:
        """There may be fewer frames than were asked for.  Each is cut when it comes, as large frames take memory."""
        from phi4edge.image_processor import crop_budget
        from phi4edge.video_files import video_frames

        budget = crop_budget(self._image_numbers(), max_crops)
        return [
            self._read_image(
                MediaPart(IMAGE, frame.image, f"{part.label}, frame {frame.index + 1}"), max(1, budget // frame.count)
            )
            for frame in video_frames(part.source, part.n_items)
        ]

    def _read_sound(self, part: MediaPart, branch: Branch | None) -> MediaInput:
        from phi4edge.audio_processor import load_audio, log_mels, n_tokens

        features = log_mels(load_audio(part.source), self._audio_numbers())
        return MediaInput(
            AUDIO, part.label, n_tokens(len(features)), digest_of(f"{AUDIO} {branch}", features), features, branch
        )

    def encode(
        self, item: MediaInput, progress: Progress | None = None, runs: dict[str, EncoderRun] | None = None
    ) -> Float32:
        """The embeddings, float32 [n_tokens, hidden]; from the cache if they were computed lately.

        runs: gets an entry, by the encoder's role in the bundle, when one had to run.

        Raises FileError, BundleError, OutOfMemoryError, UnsupportedError, Cancelled.
        """
        rows = self._cache.get(item.digest)
        if rows is None:
            item = item.with_data()
            rows = self._encode_image(item, progress) if item.kind == IMAGE else self._encode_sound(item, progress)
            if rows.shape != (item.n_tokens, self._hidden_size):
                raise BundleError(
                    f"gives {list(rows.shape)} embeddings for {item.n_tokens} tokens", path=self._path(item.kind)
                )
            self._cache.put(item.digest, rows)
            if runs is not None:
                runs[_ROLES[item.kind]] = self._run_of(item.kind)
        return rows

    def _run_of(self, kind: str) -> EncoderRun:
        encoder = self._encoders[kind]
        return EncoderRun(encoder.provider or AUTO, encoder.warnings)

    def release(self) -> None:
        """Gives the memory of the encoders and of their outputs back; they are opened again when needed."""
        for encoder in self._encoders.values():
            encoder.close()
        self._encoders.clear()
        self._cache = _new_cache()

    def _check_files(self) -> None:
        """An encoder of another model is found when the bundle is loaded, not when the first image comes."""
        if IMAGE in self.kinds:
            self._require_crop_size(VisionEncoder(self._path(IMAGE), self._hidden_size, provider=None))
        if AUDIO in self.kinds:
            AudioEncoder(self._path(AUDIO), self._hidden_size, provider=None)

    def _require_crop_size(self, encoder: VisionEncoder) -> None:
        entry = self._require_bundle().manifest.processors[IMAGE]
        size = entry.get("crop_size") if isinstance(entry, Mapping) else None
        if encoder.crop_size != size:
            encoder.close()
            raise BundleError(
                f"takes crops of {encoder.crop_size} pixels, and the manifest says {size!r:.40}",
                path=encoder.path,
                hint="convert the checkpoint again",
            )

    def _encode_image(self, item: MediaInput, progress: Progress | None) -> Float32:
        from phi4edge.image_processor import Crops, assemble

        encoder, crops = self._vision(), item.data
        if not isinstance(crops, Crops):
            raise TypeError(type(crops).__name__)
        return assemble(crops, encoder.encode(crops.pixel_values, crops.patch_mask, progress))

    def _encode_sound(self, item: MediaInput, progress: Progress | None) -> Float32:
        if not isinstance(item.data, np.ndarray) or item.branch is None:
            raise TypeError(type(item.data).__name__)
        return self._audio().encode(item.data, item.branch, progress)

    def _vision(self) -> VisionEncoder:
        encoder = self._encoders.get(IMAGE)
        if not isinstance(encoder, VisionEncoder) or not encoder.is_open:
            encoder = VisionEncoder(self._path(IMAGE), self._hidden_size, **self._options)
            self._require_crop_size(encoder)
            self._encoders[IMAGE] = encoder
        return encoder

    def _audio(self) -> AudioEncoder:
        encoder = self._encoders.get(AUDIO)
        if not isinstance(encoder, AudioEncoder) or not encoder.is_open:
            encoder = AudioEncoder(self._path(AUDIO), self._hidden_size, **self._options)
            self._encoders[AUDIO] = encoder
        return encoder

    def _path(self, kind: str) -> str:
        return str(self._require_bundle().part(_ROLES[kind]))

    def _image_numbers(self) -> ImageNumbers:
        from phi4edge.image_processor import ImageNumbers

        if IMAGE not in self._numbers:
            bundle = self._require_bundle()
            path = str(bundle.directory / MANIFEST)
            self._numbers[IMAGE] = ImageNumbers.from_manifest(bundle.manifest.processors[IMAGE], path)
        numbers: ImageNumbers = self._numbers[IMAGE]
        return numbers

    def _audio_numbers(self) -> AudioNumbers:
        from phi4edge.audio_processor import AudioNumbers

        if AUDIO not in self._numbers:
            bundle = self._require_bundle()
            try:
                self._numbers[AUDIO] = AudioNumbers.from_manifest(bundle.manifest.processors[AUDIO])
            except BundleError as error:
                path = str(bundle.directory / MANIFEST)
                raise BundleError(error.problem, path=path, field=error.field, hint=error.hint) from error
        numbers: AudioNumbers = self._numbers[AUDIO]
        return numbers

    def _require_bundle(self) -> Bundle:
        if self._bundle is None:
            raise no_encoder(IMAGE, None)
        return self._bundle


class _Again:
    """A part that has to be read once more, all frames of a video at once, as its embeddings are needed after all.

    Raises what reading it raises, and InputError when it is not the same any more.
    """

    def __init__(self, part: MediaPart, known: Sequence[MediaInput], read: Callable[[], list[MediaInput]]) -> None:
        self._part = part
        self._digests = [item.digest for item in known]
        self._read = read
        self._items: list[MediaInput] = []

    def item(self, index: int) -> MediaInput:
        if not self._items:
            items = self._read()
            if [item.digest for item in items] != self._digests:
                raise InputError("was changed while it was used", **_place(self._part), hint="try again")
            self._items = items
        return self._items[index]


def _place(part: MediaPart) -> dict[str, str]:
    """What an error says about where a part comes from."""
    return {"path": os.fsdecode(part.source)} if is_path(part.source) else {"field": part.field}


def _new_cache() -> Latest[Float32]:
    """Of embeddings by their digest."""
    return Latest(CACHE_BYTES, lambda rows: rows.nbytes)


def kinds_of(bundle: Bundle | None) -> frozenset[str]:
    """ "image" and "audio", as far as a bundle has what they need; nothing for a model file alone."""
    if bundle is None:
        return frozenset()
    manifest = bundle.manifest
    roles = {part.role for part in manifest.parts}
    tables = manifest.placeholders, manifest.processors, manifest.router
    return frozenset(kind for kind, role in _ROLES.items() if role in roles and all(kind in table for table in tables))


def no_encoder(kind: str, bundle: Bundle | None, *, field: str = "") -> InputError:
    """The error for a model that cannot take images, sounds, or videos."""
    if bundle is None:
        hint = "'phi4edge convert' makes a bundle of a Phi-4-multimodal checkpoint, which reads them"
        return InputError(f"a model file alone reads text, not {NOUNS[kind]}", field=field, hint=hint)
    return InputError(
        f"has no encoder for {NOUNS[kind]}",
        path=str(bundle.directory),
        field=field,
        hint="convert a Phi-4-multimodal checkpoint, with its encoders",
    )


def _placeholders(bundle: Bundle, kinds: frozenset[str], special_tokens: Mapping[str, int]) -> dict[str, str]:
    """The texts of the tokens that stand for these kinds; BundleError when the tokenizer does not know them."""
    path = str(bundle.directory / MANIFEST)
    found: dict[str, str] = {}
    for kind, text in bundle.manifest.placeholders.items():
        field = f"placeholders.{kind:.40}"
        if kind not in _ROLES:
            raise BundleError(f"is not one of {', '.join(_ROLES)}", path=path, field=field)
        if kind not in kinds:
            continue
        if not isinstance(text, str) or text not in special_tokens or text in found.values():
            raise BundleError(f"{text!r:.80} is not a special token of its own", path=path, field=field)
        found[kind] = text
    return found
