"""`kvpress.compress`: a context in which a model's generate runs with a compressed cache."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvpress.attach import attach, detach
from kvpress.backend import BackendRequest
from kvpress.cache import CompressedCache
from kvpress.contract import Contract, resolve
from kvpress.errors import KvpressError
from kvpress.report import Report
from kvpress.support import cache_layers, check_backend, check_contract_fits

#: tokenizers of models that kvpress.load has opened, for query laws that need text
_tokenizers: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()


def remember_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let later sessions on this model find its tokenizer."""
    _tokenizers[model] = tokenizer


def tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer that came with the model from kvpress.load, or None."""
    return _tokenizers.get(model)


class Session:
    """One `with kvpress.compress(...)`: every generate inside gets a fresh cache under the contract.

    `cache` is the newest one; it stays readable after the context has ended.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contract: Contract,
        tokenizer: Any = None,
        reference: Tensor | None = None,
        backend: str | BackendRequest = "auto",
    ) -> None:
        self.model, self.contract = model, contract
        self.tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        self.reference = reference
        self.cache: CompressedCache | None = None
        check_contract_fits(contract, model, cache_layers(model)[1], reference)
        self.backend = check_backend(backend, model)

    def __enter__(self) -> Session:
        attach(self.model).sessions.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        state = attach(self.model)
        state.sessions.remove(self)
        if self.cache is not None:
            self.cache.close()
        detach(self.model)
        detach(self.model)

    def new_cache(self) -> CompressedCache:
        """A fresh cache under this session's contract."""
        if self.cache is not None:
            self.cache.close()
        self.cache = CompressedCache(
            self.model, self.contract, tokenizer=self.tokenizer, reference=self.reference, backend=self.backend
        )
        return self.cache

    def report(self) -> Report:
        """Report of the newest cache.

        Raises:
            KvpressError: nothing was generated yet.
        """
        if self.cache is None:
            raise KvpressError("nothing to report: call model.generate inside the kvpress.compress context first")
        return self.cache.report()


def compress(
    model: PreTrainedModel,
    contract: str | dict[str, Any] | Contract,
    *,
    budget: Any = None,
    tokenizer: Any = None,
    reference: Tensor | None = None,
    backend: str | BackendRequest = "auto",
) -> Session:
    """A context in which `model.generate` (and `model(...)`) runs with a compressed cache.

    Args:
        contract: preset name (`kvpress contracts list`), YAML path, mapping or Contract.
        budget: replaces the contract's budget: 0.25 or "25%" of the prompt, "512tokens" per head, "20MB" per sequence.
        tokenizer: for query_law `reconstruction`; known already if the model came from `kvpress.load`.
        reference: [B, m] token ids of a reference answer, for query_law `oracle`.
        backend: "auto" (Triton kernels where they can run), "torch", "triton", or a BackendRequest.

    Raises:
        ContractError, UnsupportedModelError, InputError: before anything is changed on the model.
    """
    return Session(model, resolve(contract, budget), tokenizer, reference, backend)
