"""Grapheme-to-phoneme conversion with attention, in stock torch.nn modules, the way tutorials write it.

Nothing here knows of seqattn_kernels: the demo makes it faster with one call, `accelerate(model)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BahdanauAttention(nn.Module):
    """Additive attention: `v . tanh(W query + U key)` (Bahdanau, Cho and Bengio 2015, https://arxiv.org/abs/1409.0473)."""

    def __init__(self, query_size: int, key_size: int, size: int) -> None:
        super().__init__()
        self.W = nn.Linear(query_size, size)
        self.U = nn.Linear(key_size, size, bias=False)
        self.v = nn.Linear(size, 1, bias=False)

    def project(self, values: Tensor) -> Tensor:
        """values [B, S, D] -> keys [B, S, A], the same for every step of the decoder."""
        return self.U(values)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """query [B, Q], keys [B, S, A], values [B, S, D], mask [B, S], True at letters.

        Returns the context [B, D] and the weights [B, S].
        """
        scores = self.v(torch.tanh(self.W(query).unsqueeze(1) + keys)).squeeze(2)
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=1)
        context = torch.bmm(weights.unsqueeze(1), values).squeeze(1)
        return context, weights


class Encoder(nn.Module):
    def __init__(self, letters: int, embedding: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, embedding, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.rnn = nn.GRU(embedding, hidden, batch_first=True, bidirectional=True)

    def forward(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """letters [B, S], lengths [B] -> a vector for each letter [B, S, 2H], both directions' last states [B, 2H]."""
        embedded = self.dropout(self.embedding(letters))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        output, last = self.rnn(packed)
        output, _ = pad_packed_sequence(output, batch_first=True, total_length=letters.size(1))
        return output, torch.cat([last[0], last[1]], dim=1)


class Decoder(nn.Module):
    def __init__(self, phonemes: int, embedding: int, hidden: int, memory: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(phonemes, embedding)
        self.dropout = nn.Dropout(dropout)
        self.attention = BahdanauAttention(hidden, memory, hidden)
        self.cell = nn.GRUCell(embedding + memory, hidden)
        self.output = nn.Linear(hidden + memory, phonemes)

    def forward(
        self, phoneme: Tensor, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step: the last phoneme [B] and the state [B, H] -> logits [B, V], the next state, weights [B, S]."""
        context, weights = self.attention(hidden, keys, values, mask)
        embedded = self.dropout(self.embedding(phoneme))
        hidden = self.cell(torch.cat([embedded, context], dim=1), hidden)
        logits = self.output(self.dropout(torch.cat([hidden, context], dim=1)))
        return logits, hidden, weights


class G2P(nn.Module):
    """Letters in, phonemes out.

    letters, phonemes: sizes of the two vocabularies; embedding: size of the embeddings; hidden: size of the decoder's
    state, each direction of the encoder has half of it.
    """

    def __init__(self, letters: int, phonemes: int, embedding: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = Encoder(letters, embedding, hidden // 2, dropout)
        self.bridge = nn.Linear(hidden, hidden)
        self.decoder = Decoder(phonemes, embedding, hidden, hidden, dropout)

    def encode(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Everything the decoder needs of a word: its first state, keys, values and the mask of its letters."""
        values, last = self.encoder(letters, lengths)
        keys = self.decoder.attention.project(values)
        mask = torch.arange(letters.size(1)) < lengths.unsqueeze(1)
        return torch.tanh(self.bridge(last)), keys, values, mask

    def searcher(self, letters: Tensor, lengths: Tensor) -> tuple:
        """A step function for the words, its first state and what stays: see seqattn_kernels.decoding."""
        hidden, *memory = self.encode(letters, lengths)

        def step(phoneme: Tensor, hidden: Tensor, memory: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, hidden, weights = self.decoder(phoneme, hidden, *memory)
            return logits.log_softmax(dim=1), hidden, weights

        return step, hidden, memory

    def forward(self, letters: Tensor, lengths: Tensor, phonemes: Tensor) -> Tensor:
        """Teacher forcing: letters [B, S], lengths [B], right phonemes shifted by one [B, T] -> logits [B, T, V]."""
        hidden, keys, values, mask = self.encode(letters, lengths)
        logits = []
        for t in range(phonemes.size(1)):
            step, hidden, _ = self.decoder(phonemes[:, t], hidden, keys, values, mask)
            logits.append(step)
        return torch.stack(logits, dim=1)
