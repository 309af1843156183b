.PHONY: check test lint format lock

check: lint test  ## What CI runs

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	pyright

format:
	ruff check --fix .
	ruff format .

lock:  ## Pin every dependency again; add UPGRADE=--upgrade for the newest versions
	uv pip compile --universal --python-version 3.11 --all-extras --group dev \
	    --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
	    $(UPGRADE) --quiet --output-file requirements.txt pyproject.toml
