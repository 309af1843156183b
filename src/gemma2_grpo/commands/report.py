"""`gemma2-grpo report`: what a run did, as one HTML file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from gemma2_grpo.commands.options import Flag


@dataclass(frozen=True)
class Report:
    """Write what a run did as one HTML file; training does so itself."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run directory, finished or not."""
    compare: Annotated[Path | None, arg(metavar="RUN2")] = None
    """Compare with this run instead of writing the full report."""
    to: Annotated[Path | None, arg(metavar="FILE")] = None
    """The file. Default: report.html, or compare.html, in the run directory."""
    png: Flag = False
    """Write the plots as PNG too, into a folder `plots` next to it."""

    def __call__(self) -> None:
        """Writes the report, and prints where it is."""
        from gemma2_grpo.report.report import write_comparison, write_report

        if self.compare:
            print(write_comparison((self.run, self.compare), self.to, plots=self.png))
        else:
            print(write_report(self.run, self.to, plots=self.png))
