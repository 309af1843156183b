"""Templates of the package: reports, model cards and recipes for clusters."""

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates_of(package: str, *, is_html: bool = False, **filters: Callable) -> Environment:
    """The templates of a package, in which an unknown name is an error.

    Args:
        package: Its folder `templates` has them.
        is_html: Escape all text that is filled in.
        filters: Functions that templates may apply, by name.
    """
    environment = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_html,
        autoescape=is_html,  # noqa: S701 (shell, YAML and Markdown have filters of their own)
    )
    environment.filters |= filters
    return environment
