"""Pages of HTML from the templates beside this module. Called by data_page and evaluation_page."""

import functools
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


@functools.cache
def template(name: str) -> "jinja2.Template":
    """The template of a file, compiled once a process. Text that is put in is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["short"] = lambda value: "" if value is None else f"{value:.4g}"
    return environment.from_string(files(__package__).joinpath(name).read_text(encoding="utf-8"))
