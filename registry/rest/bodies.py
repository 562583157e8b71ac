"""What requests may say: the only place where pydantic is used. Unknown fields are refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..api import DAY_S
from ..domain.access import EVERY_NAME, Scope
from ..domain.base_dtype import DTYPES
from ..domain.recipe import MergeRequest, ResizeRequest, parse_layer_weights
from ..domain.refs import check_name, parse_parent, parse_ref
from ..domain.signature import MAX_PAYLOAD, MAX_SEAL, MAX_SEALS, MAX_TYPE, PAYLOAD_TYPE, Envelope, Seal
from ..domain.tuning import DEFAULT_BUDGET, TuneRequest

Text = Annotated[str, Field(max_length=5000)]
Short = Annotated[str, Field(max_length=512)]
Ref = Annotated[str, Field(max_length=300, description="NAME[:vN | @STAGE | @sha256:HEX]", examples=["translate:v3"])]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
SuiteDigest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Of a suite that was sent to /v1/suites.")]
BaseDtype = Annotated[str, Field(max_length=512, description=f"Of the base: {', '.join(DTYPES)}.", examples=["nf4"])]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RegisterBody(Body):
    """A new version. Over this wire a source is hf://, runs:/ or models:/, never a path; or the files come along."""

    source: Annotated[Text, Field(examples=["hf://org/repo@3f2a"])]
    base: Short | None = None
    kind: Literal["import", "train"] = "import"
    trained_from: Ref | None = None
    metrics: dict[Short, Finite] = {}
    params: dict[Short, Text] = {}
    tags: dict[Short, Text] = {}
    dataset: Text | None = None
    license: Short | None = None
    suite: SuiteDigest | None = None
    assume_converted: bool = False


class MergeBody(Body):
    """A merge, or the plan of one."""

    parents: Annotated[
        list[Annotated[str, Field(max_length=330, examples=["translate:v3", "chat:v5=0.6"])]], Field(max_length=64)
    ]
    into: Short | None = None
    method: Short = "sum"
    rank: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    dtype: Short | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    options: dict[Short, float | int | bool | Short] = {}
    suites: Annotated[list[SuiteDigest], Field(max_length=32)] = []
    max_loss: Finite | None = None
    layers: Annotated[
        list[Annotated[str, Field(max_length=2000, examples=["layers.0-15=0.7,0.3"])]], Field(max_length=1000)
    ] = []
    expect: tuple[Digest, Digest] | None = None
    tags: Annotated[dict[Short, Text], Field(max_length=64)] = {}

    def request(self) -> MergeRequest:
        """Raises `InvalidInput` for a reference that cannot be read."""
        return MergeRequest(
            parents=tuple(parse_parent(parent) for parent in self.parents),
            into=check_name(self.into) if self.into is not None else None,
            method=self.method,
            rank=self.rank,
            dtype=self.dtype,
            seed=self.seed,
            options=self.options,
            suites=tuple(self.suites),
            max_loss=self.max_loss,
            layers=tuple(map(parse_layer_weights, self.layers)),
            expect=self.expect,
            tags=self.tags,
        )


class ResizeBody(Body):
    """A version at a smaller rank, or the plan of one: exactly one of `rank`, `energy` and `size_bytes`."""

    ref: Ref
    rank: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    energy: Annotated[Finite, Field(description="Share of the squared norm that is kept.", examples=[0.99])] | None = (
        None
    )
    size_bytes: Annotated[int, Field(ge=1, description="Of the weights file, at most.")] | None = None
    into: Short | None = None
    dtype: Short | None = None
    suites: Annotated[list[SuiteDigest], Field(max_length=32)] = []

    def request(self) -> ResizeRequest:
        """Raises `InvalidInput` for a reference that cannot be read."""
        return ResizeRequest(
            ref=parse_ref(self.ref),
            rank=self.rank,
            energy=self.energy,
            size_bytes=self.size_bytes,
            into=check_name(self.into) if self.into is not None else None,
            dtype=self.dtype,
            suites=tuple(self.suites),
        )


class VerifyBody(Body):
    ref: Ref
    rerun: bool = True


class EvaluateBody(Body):
    refs: Annotated[list[Ref], Field(min_length=1, max_length=64)]
    suites: Annotated[list[SuiteDigest], Field(max_length=32)] = []
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    base_dtype: BaseDtype | None = None


class TuneBody(Body):
    """A search for the weights of a merge."""

    parents: Annotated[list[Ref], Field(min_length=2, max_length=16)]
    into: Short | None = None
    suites: Annotated[list[SuiteDigest], Field(max_length=32)] = []
    methods: Annotated[list[Short], Field(min_length=1, max_length=16)] = ["cat", "svd"]
    ranks: Annotated[list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(max_length=16)] = []
    budget: Annotated[int, Field(ge=1, le=1000)] = DEFAULT_BUDGET
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    keep: Annotated[int, Field(ge=0, le=16, description="How many of the best to make versions of.")] = 0
    layer_groups: Annotated[int, Field(ge=1, le=1000, description="Runs of layers, each with weights of its own.")] = 1
    base_dtype: BaseDtype | None = None

    def request(self) -> TuneRequest:
        """Raises `InvalidInput` for a reference that cannot be read."""
        return TuneRequest(
            parents=tuple(parse_ref(parent) for parent in self.parents),
            into=check_name(self.into) if self.into is not None else None,
            suites=tuple(self.suites),
            methods=tuple(self.methods),
            ranks=tuple(self.ranks),
            budget=self.budget,
            seed=self.seed,
            limit=self.limit,
            keep=self.keep,
            layer_groups=self.layer_groups,
            base_dtype=self.base_dtype,
        )


class SuiteChoice(Body):
    suite: SuiteDigest


class PromoteBody(Body):
    version: Annotated[str, Field(max_length=100, description="3, @STAGE or @sha256:HEX", examples=["3"])]
    to: Short
    reason: Text = ""
    force: Annotated[bool, Field(description="Though the gate refuses; needs the scope force, and a reason.")] = False


class ApprovalBody(Body):
    version: Annotated[str, Field(max_length=100, description="3, @STAGE or @sha256:HEX", examples=["3"])]
    to: Short
    reason: Text = ""
    withdraw: bool = False


class TagsBody(Body):
    put: Annotated[dict[Short, Text], Field(max_length=64, examples=[{"reviewed": "yes"}])] = {}
    remove: Annotated[list[Short], Field(max_length=64)] = []
    reason: Text = ""


class SealBody(BaseModel):
    """One signature of an envelope. DSSE wants fields that are not known to be passed over, in the envelope too."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sig: Annotated[str, Field(max_length=MAX_SEAL, description="base64")]
    keyid: Annotated[str, Field(max_length=MAX_SEAL)] = ""


class EnvelopeBody(BaseModel):
    """DSSE around the in-toto Statement that docs/gates.md describes."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    payload: Annotated[str, Field(max_length=MAX_PAYLOAD, description="base64")]
    payloadType: Annotated[str, Field(max_length=MAX_TYPE, examples=[PAYLOAD_TYPE])]
    signatures: Annotated[list[SealBody], Field(min_length=1, max_length=MAX_SEALS)]

    def seen(self) -> Envelope:
        seals = tuple(Seal(seal.sig, seal.keyid) for seal in self.signatures)
        return Envelope(self.payload, self.payloadType, seals)


class SignatureBody(Body):
    envelope: EnvelopeBody
    key: Annotated[str, Field(max_length=1000, description="The public Ed25519 key, in PEM or the base64 of it.")]


class StageBody(Body):
    stage: Short
    reason: Text = ""


class RebuildBody(Body):
    """Which version takes the place of which, in all that is made of it or in `until` alone."""

    old: Ref
    new: Ref
    until: Ref | None = None
    dry_run: bool = False


class DoctorBody(Body):
    """The adapters for which more is accepted: a rename under which other rules hold, versions lost with their runs."""

    force: Annotated[list[Short], Field(max_length=1000)] = []


NO_FORCE = DoctorBody()


class GcBody(Body):
    older_than_s: Finite = DAY_S
    dry_run: bool = False


class RecallBody(Body):
    version: Annotated[str, Field(max_length=100, description="3, @STAGE or @sha256:HEX", examples=["3"])]
    reason: Text


class AdoptBody(StageBody):
    force: Annotated[bool, Field(description="Though the gate refuses; needs the scope force, and a reason.")] = False


class ResultsBody(Body):
    """Metrics that were measured elsewhere; without any, `source` is runs:/ID of the registry's MLflow."""

    source: Annotated[str, Field(min_length=1, max_length=512)]
    metrics: Annotated[dict[Short, Finite], Field(max_length=1000)] | None = None
    replace: Annotated[bool, Field(description="Other values that the version has of them.")] = False


class BaseBody(Body):
    """A base, pinned by a revision or by digests of its files."""

    name: Short
    revision: Short | None = None
    config_digest: Short | None = None
    weights_digest: Short | None = None
    tokenizer_digest: Short | None = None

    def pins(self) -> dict[str, str]:
        return {
            key: value
            for key in ("config_digest", "weights_digest", "tokenizer_digest")
            if (value := getattr(self, key)) is not None
        }


class AliasBody(Body):
    spelling: Short
    base: Short


class BaseMergeBody(Body):
    keep: Short
    drop: Short


class TokenBody(Body):
    name: Short
    scope: Scope
    names: Annotated[list[Short], Field(max_length=32)] = list(EVERY_NAME)
    valid_s: Finite | None = None
