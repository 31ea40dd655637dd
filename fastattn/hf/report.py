"""What `patch` did, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """Modules of one class that met the same fate.

    part    "attention", "norm" or "rope"
    module  the class
    count   how many modules of it
    first   the path of the first one in the model
    done    replaced or not
    detail  by what, or why not
    """

    part: str
    module: str
    count: int
    first: str
    done: bool
    detail: str


@dataclass
class Report:
    """The rows of one `patch`; `print(report)` shows the table."""

    model: str
    rows: list[Row] = field(default_factory=list)

    def add(self, part: str, module: object, path: str, done: bool, detail: str) -> None:
        """Count one module; equal rows are one row."""
        name = type(module).__name__
        for i, row in enumerate(self.rows):
            if (row.part, row.module, row.done, row.detail) == (part, name, done, detail):
                self.rows[i] = Row(part, name, row.count + 1, row.first, done, detail)
                return
        self.rows.append(Row(part, name, 1, path, done, detail))

    def replaced(self, part: str) -> int:
        """How many modules of that part run on fastattn now."""
        return sum(row.count for row in self.rows if row.part == part and row.done)

    def kept(self) -> list[Row]:
        """The rows that were not replaced."""
        return [row for row in self.rows if not row.done]

    def __str__(self) -> str:
        head = ("part", "module", "count", "", "by what / why not", "first")
        cells = [
            (row.part, row.module, str(row.count), "replaced" if row.done else "KEPT", row.detail, row.first)
            for row in sorted(self.rows, key=lambda row: (row.part, not row.done))
        ]
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *cells)]
        return "\n".join([f"fastattn in {self.model}:", *(lines if cells else ["nothing to replace was found"])])
