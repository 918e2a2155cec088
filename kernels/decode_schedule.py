"""Work of decode attention that rows share, see `shared_prefix`: on the host, and where kernels read it."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]

PAGES_PER_SPLIT = 4


@dataclass(frozen=True, slots=True, eq=False)
class DecodeSchedule:
    """Items of work: item i computes split `split[i]` for the decode rows `rows[first[i] : first[i + 1]]`.

    Each split that holds tokens of a row is computed for it by exactly one item.
    """

    split: Ints  # [I] ascending
    first: Ints  # [I + 1]
    rows: Ints  # [E] ascending inside an item
    uploaded: dict[tuple[int, torch.device], "DeviceBlocks"] = field(default_factory=dict)  # what `on` has sent

    @property
    def num_items(self) -> int:
        return len(self.split)

    @property
    def num_page_reads_saved(self) -> int:
        """Pages that are not read a second time, of each layer and KV head."""
        return (len(self.rows) - self.num_items) * PAGES_PER_SPLIT

    def blocks(self, rows_per_block: int) -> Ints:
        """-> [B, 3]: split, index into `rows`, number of rows; items come in blocks of at most `rows_per_block`."""
        size = np.diff(self.first)
        num_blocks = -(-size // rows_per_block)
        item = np.repeat(np.arange(self.num_items), num_blocks)
        place = np.arange(len(item)) - np.repeat(num_blocks.cumsum() - num_blocks, num_blocks)
        start = place * rows_per_block
        columns = (self.split[item], self.first[item] + start, np.minimum(size[item] - start, rows_per_block))
        return np.stack(columns, axis=1)

    def on(self, device: torch.device, rows_per_block: int) -> "DeviceBlocks":
        """`blocks` and `rows`, sent to the device at the first call only, in one asynchronous copy."""
        key = (rows_per_block, device)
        if key not in self.uploaded:
            blocks = self.blocks(rows_per_block)
            flat = torch.from_numpy(np.concatenate([blocks.ravel(), self.rows]))
            if device.type == "cuda":
                flat = flat.pin_memory()
            self.uploaded[key] = DeviceBlocks(len(blocks), flat.to(device, non_blocking=True))
        return self.uploaded[key]


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """A schedule on a device: `data` holds [num_blocks, 3] as in `DecodeSchedule.blocks`, then the rows."""

    num_blocks: int
    data: Tensor  # [3 * num_blocks + E] int64
