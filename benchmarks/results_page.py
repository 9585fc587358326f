"""Tables of README.md, docs/results.md and docs/architectures.md, made from results/*.json.

``python -m benchmarks.results_page`` writes them anew.

A table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end -->`` of a page; the rest of the page is written by
hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.tables import ROOT, Row, against, asked, cell, chosen, exists, pivot, rows, settings, show, spread, table

PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "architectures.md"]
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return a page with every table of it made anew. Raises KeyError: a table that is not known."""
    return _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


# -- README.md ---------------------------------------------------------------------------------------------------------


def four() -> str:
    eigen = [max(row["error of lambda_max"], row["error of lambda_min"]) for row in rows("architectures")]
    ranks = [row[f"{n} ranks"] for row in rows("ranks") if row["dtype"] == "float64" for n in (2, 3, 4)]
    peers = {row["tool"]: row for row in rows("peers")}
    ours, theirs = (
        peers[f"{tool}, {kind}"]
        for tool, kind in (("hpc_hess", "central differences"), ("hessian-eigenthings 1.0.0a5", "finite differences"))
    )
    kills = rows("soak")
    return table(
        [
            {
                "question": f"Are eigenvalues right? {len(eigen)} toy architectures, against dense float64 Hessians",
                "measured": f"at most {show(max(eigen))} off, of the largest",
            },
            {
                "question": "Does the number of ranks change the result? The same toys on 2, 3 and 4 ranks, float64",
                "measured": f"alpha and beta at most {show(max(ranks))} apart",
            },
            {
                "question": "How fast is a Lanczos step? SmolLM2-135M, two cores, finite differences, against "
                "hessian-eigenthings",
                "measured": f"{show(ours['Lanczos step, s'])} s against {show(theirs['Lanczos step, s'])} s; errors "
                f"{show(ours['error'])} and {show(theirs['error'])}",
            },
            {
                "question": f"What does a kill cost? {sum(r['kills'] for r in kills)} kills at random instants",
                "measured": f"at most {max(r['completed steps lost, at most'] for r in kills)} completed step; "
                f"{sum(r['not bitwise equal'] for r in kills) or 'no'} results with other bits",
            },
        ]
    )


# -- docs/results.md ---------------------------------------------------------------------------------------------------


def right() -> str:
    toys, ranks = rows("architectures"), {kind: [] for kind in ("float64", "float32")}  # type: dict
    for row in rows("ranks"):
        ranks[row["dtype"]].append(max(row[f"{n} ranks"] for n in (2, 3, 4)))
    within = sum(worst <= 1e-3 for worst in ranks["float32"])
    exact = [cell("exact_runs", f"exact fp32, 10 steps: alpha and beta on {n} ranks") for n in (2, 3, 4)]
    ritz = [cell("exact_runs", f"lambda_{end} of 30 steps") for end in ("min", "max")]
    index = rows("index_scale")
    return asked(
        (
            f"{len(toys)} toy architectures: extreme eigenvalues, against dense float64 Hessians",
            "1e-6 of the largest",
            f"at most {show(max(max(r['error of lambda_max'], r['error of lambda_min']) for r in toys))}",
            "architectures",
        ),
        (
            "the same: products in float64, against curvlinops",
            "1e-6",
            spread(r["product against curvlinops"] for r in toys),
            "architectures",
        ),
        (
            "the same: alpha and beta on 2, 3, 4 ranks against one, float64",
            "1e-8",
            f"at most {show(max(ranks['float64']))}",
            "ranks",
        ),
        (
            "the same in float32, central differences",
            "1e-3",
            f"{within} of {len(ranks['float32'])} within; at most {show(max(ranks['float32']))}",
            "ranks",
        ),
        (
            "SmolLM2-135M, exact products in float32: alpha and beta on 2, 3, 4 ranks against one, 10 steps",
            "1e-5",
            f"at most {show(max(exact))}",
            "exact_runs",
        ),
        (
            "SmolLM2-135M: extreme Ritz values of 30 steps by central differences, against exact products",
            "1 %",
            f"at most {show(max(ritz))} %",
            "exact_runs",
        ),
        (
            "index arithmetic, probes and a sparse store at N = 1.2e11",
            "seconds, all correct",
            f"{spread(r['seconds'] for r in index)} s each, "
            f"{sum(r['correct'] is True for r in index)} of {len(index)} correct",
            "index_scale",
        ),
    )


def in_programs() -> str:
    found, name = rows("api_equality"), "api_equality"
    ways = [row for row in found if row["what"].rsplit(", ", 1)[-1].endswith(("rank", "ranks"))]
    losses = [row for row in found if row["what"].startswith("all of these")]
    trained = [row for row in found if row["what"].startswith("training")]
    same = sum(row["measured"] == "yes" for row in trained)
    return asked(
        *(
            (
                f"{kind} on 1 to 4 ranks, against one process: products, Ritz values, trace, a pair, a solve",
                "1e-8",
                most,
                name,
            )
            for kind in ("FSDP2", "HSDP", "DDP", "plain replicas")
            for most in [f"at most {show(max(r['measured'] for r in ways if r['what'].startswith(kind)))}"]
        ),
        (f"the same products of {len(losses)} losses of people's own", "1e-8", spread(r["measured"] for r in losses), name),
        *((r["what"], r["asked"].removeprefix("<= "), show(r["measured"]), name) for r in found if r["what"][:3] == "DPO"),
        (
            "trainings whose weights are the same bits with a spectrum in the middle",
            "all",
            f"{same} of {len(trained)}",
            name,
        ),
    )


def cost() -> str:
    def number(name: str, what: str) -> float:
        return cell(f"product_cost{name}", what)

    adamw = {row["step"].removeprefix("Lanczos: "): row for row in rows("overhead")}
    central, full, exact = (
        adamw[key]
        for key in (
            "central, no reorthogonalisation",
            "central, full reorthogonalisation",
            "exact, full reorthogonalisation",
        )
    )
    two = rows("two_ranks")[-1]
    return asked(
        (
            "a central product, with full reorthogonalisation",
            "2.05 gradients",
            against(number("", "central product / gradient"), 2.05),
            "product_cost",
        ),
        (
            "a central product, without reorthogonalisation",
            "2.05 gradients",
            against(number("_none", "central product / gradient"), 2.05),
            "product_cost_none",
        ),
        (
            "a forward product",
            "1.05 gradients",
            against(number("_forward_none", "forward product / gradient"), 1.05),
            "product_cost_forward_none",
        ),
        (
            "Lanczos bookkeeping without reorthogonalisation, of central products",
            "1.5 %",
            against(number("_none", "Lanczos bookkeeping"), 1.5, " %"),
            "product_cost_none",
        ),
        (
            "Lanczos bookkeeping without reorthogonalisation, of forward products",
            "1.5 %",
            against(number("_forward_none", "Lanczos bookkeeping"), 1.5, " %"),
            "product_cost_forward_none",
        ),
        (
            "Lanczos bookkeeping of 20 fully reorthogonalised steps, of central products",
            "5 %",
            against(number("", "Lanczos bookkeeping"), 5, " %"),
            "product_cost",
        ),
        (
            "what checkpoints add to a step: rows are written while the next product runs",
            "3 %",
            against(number("", "checkpoints / products"), 3, " %"),
            "product_cost",
        ),
        (
            "a central product on two ranks of one thread",
            "2.1 gradients",
            against(number("_2_ranks", "central product / gradient"), 2.1),
            "product_cost_2_ranks",
        ),
        (
            "Lanczos bookkeeping on two ranks",
            "10 %",
            against(number("_2_ranks", "Lanczos bookkeeping"), 10, " %"),
            "product_cost_2_ranks",
        ),
        (
            "central products on two ranks of one core, against one process with both: speed",
            "0.85",
            show(two["speed against one process (asked 0.85)"]),
            "two_ranks",
        ),
        (
            "time of a Lanczos step over an AdamW step on the same tokens: central without, with reorthogonalisation, exact",
            "",
            ", ".join(show(row["of AdamW"]) for row in (central, full, exact)),
            "overhead",
        ),
        (
            "peak memory of the same, over that of the AdamW step",
            "",
            ", ".join(show(row["memory of AdamW"]) for row in (central, full, exact)),
            "overhead",
        ),
    )


def space() -> str:
    def disk(what: str) -> float:
        return next(row["measured"] for row in rows("basis_on_disk") if row["what"].startswith(what))

    memory = {row["part"]: row["of the sum"] for row in rows("memory")}
    with_check, without = (next(v for k, v in memory.items() if k.endswith(end)) for end in ("(the default)", "without it"))
    bandwidth = {row["driver"]: row["row / dd, median of the turns"] for row in rows("row_bandwidth")}
    rounded = rows("basis_dtype")[1]
    return asked(
        (
            "peak memory of a rank over the sum of what a run must hold, without the check against the exact product",
            "1.10",
            against(float(without), 1.1),
            "memory",
        ),
        ("the same with that check (the default)", "1.10", against(float(with_check), 1.1), "memory"),
        (
            "peak memory of a rank, exact products over central differences",
            "1.3",
            against(cell("exact_runs", "peak memory of a rank"), 1.3),
            "exact_runs",
        ),
        (
            "20 fully reorthogonalised steps from disk, under a memory limit that forbids caching: time over that in memory",
            "2",
            against(disk("disk / memory"), 2),
            "basis_on_disk",
        ),
        ("the same: memory for the basis", "1.5 GB", against(disk("basis memory of the run"), 1.5, " GB"), "basis_on_disk"),
        (
            "the same: alpha equal to the last bit",
            "yes",
            "yes" if disk("alpha equal") in (True, "True") else "no",
            "basis_on_disk",
        ),
        (
            "rows in bfloat16, 20 steps: largest inner product of two rows (float32: "
            f"{show(rows('basis_dtype')[0]['largest inner product of two rows'])})",
            "",
            show(rounded["largest inner product of two rows"]),
            "basis_dtype",
        ),
        (
            "the same: extreme Ritz values moved, of the largest",
            "",
            show(rounded["extreme Ritz values off, of the largest"]),
            "basis_dtype",
        ),
        (
            "a basis row from 2 ranks to the disk, over the rate of `dd conv=fsync`: rank files",
            "0.6",
            show(bandwidth["files"]),
            "row_bandwidth",
        ),
        ("the same: MPI", "0.6", show(bandwidth["mpio"]), "row_bandwidth"),
    )


def stopped() -> str:
    found = rows("soak")
    mpi, smollm2 = (sum(r["kills"] for r in found if word in r["run"]) for word in ("MPI", "SmolLM2"))
    kills = sum(r["kills"] for r in found)
    return asked(
        (
            "kills at random instants, each followed by a resume",
            "100",
            f"{kills}: {kills - mpi} with rank files, {mpi} over MPI; {smollm2} of them of SmolLM2-135M",
            "soak",
        ),
        (
            "completed steps lost by one of them",
            "1",
            f"at most {max(r['completed steps lost, at most'] for r in found)}",
            "soak",
        ),
        (
            "finished runs with other bits than a run that was not killed",
            "0",
            str(sum(r["not bitwise equal"] for r in found)),
            "soak",
        ),
    )


def pairs() -> str:
    found = rows("eigenpairs_solvers")
    few = sum(row["hpc_hess"] <= row["ARPACK"] for row in found)
    more = max(row["hpc_hess"] - row["ARPACK"] for row in found)
    values = [cell("eigenpairs", f"eigenvalue {k}", "hpc_hess off the last") for k in range(2, 10)]
    values += [
        float(r["hpc_hess off the last"].split()[0])
        for r in rows("eigenpairs")
        if r["what"] in ("eigenvalue 1", "eigenvalue 10")
    ]
    two = {
        what: (cell("eigenpairs", what, "hpc_hess"), cell("eigenpairs", what, "eigsh on curvlinops"))
        for what in ("products", "seconds a product", "peak memory")
    }
    return asked(
        (
            "products for 5 pairs of three spectra at two tolerances, medians: thick restarts",
            "no more than ARPACK",
            f"{min(r['hpc_hess'] for r in found)} to {max(r['hpc_hess'] for r in found)}: as many or fewer in {few} of "
            f"{len(found)} cases, else {more} more",
            "eigenpairs_solvers",
        ),
        (
            "the same: ARPACK; PRIMME",
            "",
            "; ".join(f"{min(r[k] for r in found)} to {max(r[k] for r in found)}" for k in ("ARPACK", "PRIMME")),
            "eigenpairs_solvers",
        ),
        (
            "five largest and five smallest eigenvalues of SmolLM2-135M (1 x 64 tokens): products, against eigsh on "
            "curvlinops",
            "no more",
            "{:g} against {:g}".format(*two["products"]),
            "eigenpairs",
        ),
        (
            "the same: largest residual, of the largest eigenvalue",
            "1e-3",
            show(cell("eigenpairs", "largest residual", "hpc_hess")),
            "eigenpairs",
        ),
        ("the same: furthest apart", "0.1 %", f"{show(max(values))} %", "eigenpairs"),
        ("the same: seconds of a product", "", "{:g} against {:g}".format(*two["seconds a product"]), "eigenpairs"),
        ("the same: peak memory", "", "{:g} GB against {:g}".format(*two["peak memory"]), "eigenpairs"),
    )


def planned() -> str:
    plans, laws = rows("planner_fixed_step"), rows("scaling_laws")

    def within(ratios: list[float], limit: float) -> str:
        inside = sum(abs(ratio - 1) <= limit / 100 for ratio in ratios)
        return f"{spread(ratios)}; {inside} of {len(ratios)} within {limit:g} %"

    def plan(what: str, column: str, alone: bool, limit: float) -> str:
        return within(
            [row[column] for row in plans if row["operator"].startswith(what) and (row["ranks"] == 1) == alone], limit
        )

    def law(kind: str) -> list[float]:
        return [row["predicted / measured"] for row in laws if row["law"] == kind]

    memory, seconds = "predicted / measured", "time predicted / measured"
    found = [
        (f"{what}, {kind}, {who}", f"{limit} %", plan(key, column, alone, limit), "planner_fixed_step")
        for alone, who in ((True, "one rank"), (False, "2 to 4 ranks that share two cores"))
        for key, kind in (("finite", "differences"), ("exact", "exact products"))
        for what, limit, column in (("peak memory", 5, memory), ("seconds of a product", 15, seconds))
    ]
    return asked(
        *found,
        (
            "laws fitted to runs of 9, 24 and 51 M on 1 and 2 ranks, predicting 93 M: seconds of a step",
            "15 %",
            within(law("time"), 15),
            "scaling_laws",
        ),
        ("the same: memory", "", spread(law("memory")), "scaling_laws"),
    )


def intrinsic() -> str:
    found: dict[str, list[Row]] = {}
    for row in rows("intrinsic_digits"):
        found.setdefault(row["sketch"], []).append(row)
    return table(
        [
            {
                "sketch": name,
                "log2 D*": ", ".join(str(r["log2 D*"]) for r in runs),
                "half of it suffices too": ", ".join(
                    "yes" if r["half reaches it"] in (True, "True") else "no" for r in runs
                ),
            }
            for name, runs in found.items()
        ]
    )


def intake() -> str:
    types = rows("intake_sweep")
    ran = [row for row in types if row["runs in transformers"] == "yes"]
    kinds = ("passed", "noted", "refused", "error")
    return table(
        [
            {"types of causal LMs": str(len(types)), "that run in transformers when tiny": str(len(ran))}
            | {kind: str(sum(row["verdict"] == kind for row in ran)) for kind in kinds}
        ]
    )


# -- docs/architectures.md -----------------------------------------------------------------------------------------------


def causal_lms() -> str:
    found = rows("causal_lms")
    ran = [row for row in found if row["runs"] == "yes"]
    right = [row for row in ran if row["agrees"] == "yes"]
    exact, rounded = ([row["exact"] for row in right if bool(row["rounds inside"]) == inside] for inside in (False, True))
    return asked(
        ("names in transformers", "", str(settings("causal_lms")["names in transformers"]), "causal_lms"),
        ("measured", "all", str(len(found)), "causal_lms"),
        ("their tiny model runs a forward pass", "", str(len(ran)), "causal_lms"),
        (
            "of these, everything agrees",
            "95 %",
            f"{len(right)}, {100 * len(right) / len(ran):.3g} %" + (": missed" if len(right) < 0.95 * len(ran) else ""),
            "causal_lms",
        ),
        ("exact products, against double backward in float64", "1e-9", f"at most {show(max(exact))}", "causal_lms"),
        (
            f"the same, of {len(rounded)} models that round to float32 inside",
            "1e-5",
            f"at most {show(max(rounded))}" if rounded else "",
            "causal_lms",
        ),
        (
            "2 ranks against one, from safetensors",
            "1e-12",
            f"at most {show(max(row['2 ranks'] for row in right))}",
            "causal_lms",
        ),
        (
            "central differences against exact products",
            "1e-3",
            f"at most {show(max(row['differences'] for row in right))}",
            "causal_lms",
        ),
        (
            "multiplied block by block; the others as a whole",
            "",
            f"{sum(row['product'] == 'blocks' for row in right)}",
            "causal_lms",
        ),
    )


def loading() -> str:
    def parts(row: Row) -> tuple[str, str]:
        what, case = row["what"].split(": ")
        return f"{what} (asked: {row['asked']})" if row.get("asked") else what, case

    found = [{"case": parts(row)[1], "what": parts(row)[0], "measured": row["measured"]} for row in rows("loading")]
    return pivot(found, {"case": "file and ranks"}, lambda row: (row["what"], row["measured"]))


def architectures(agree: str) -> str:
    numbers = ("attention", "product", "exact", "differences", "2 ranks")
    columns = ("type", *numbers, "why") if agree == "yes" else ("type", "class", "why")
    return table([{name: row[name] for name in columns} for row in rows("causal_lms") if row["agrees"] == agree])


def trusted() -> str:
    parts = {"coverage": claims, "fuzz": mutated, "intake_time": intake_time, "bytes_left": left}
    return asked(*((*row, name) for name, part in parts.items() if exists(name) for row in part(rows(name))))


def claims(found: list[Row]) -> list[tuple[str, str, str]]:
    least = min((row for row in found if row["stated"] < 1), key=lambda row: float(row["observed"]) - float(row["stated"]))
    shown = f"{sum(map(below, found))} of {len(found)}; the least: {show(float(least['observed']))} for {least['stated']}"
    return [(f"intervals, bands and bounds over {least['seeds']} seeds: clearly below their level", "0", shown)]


def mutated(found: list[Row]) -> list[tuple[str, str, str]]:
    damaged = [row for row in found if row["what"].startswith("damaged")]
    others = [row for row in found if row not in damaged]
    traces, crashes = sum(row["traceback"] for row in damaged), sum(row["crash"] for row in damaged)
    return [
        (
            "mutated configurations; tracebacks",
            "18,000; 0",
            f"{others[0]['tried']:,}; {sum(row['traceback'] for row in others)}",
        ),
        (
            "damaged run directories; tracebacks; commands in which the HDF5 library crashed",
            "300; 0; 0",
            f"{max(row['tried'] for row in damaged)}; {traces}; {crashes}",
        ),
    ]


def intake_time(found: list[Row]) -> list[tuple[str, str, str]]:
    return [
        (f"the intake's share of the demo's time ({row['method'].replace('_', ' ')})", "3 %", row["of the run"])
        for row in found
        if row["check"] == "all checks"
    ]


def left(found: list[Row]) -> list[tuple[str, str, str]]:
    end = next(row for row in found if row["when"].startswith("gone on"))
    return [("disk space of the demo's run directory at its end", "100 MB", f"{show(float(end['MB']))} MB")]


def below(row: Row) -> bool:
    """Return whether a statement holds less often than it says, by more than twice what chance explains."""
    level, seeds = float(row["stated"]), int(row["seeds"])
    return float(row["observed"]) < level - 2 * (level * (1 - level) / seeds) ** 0.5


def weak() -> str:
    return pivot(
        rows("weak_scaling"),
        {"model": "model", "tokens a rank": "tokens a rank"},
        lambda row: (f"{row['ranks']} ranks", float(row["traffic, s"]) / float(row["arithmetic, s"])),
    )


def blocks() -> str:
    return pivot(
        [row | {"blocks": f"{row['blocks']} ({row['number']:,})"} for row in rows("block_diagonal")],
        {"blocks": "blocks"},
        lambda row: (f"{row['direction']}: error, cosine", f"{show(row['relative error'])}, {show(row['cosine'])}"),
    )


def sketch_cost() -> str:
    return pivot(
        [row for row in rows("sketch_cost") if row.get("log2 D")],
        {"sketch": "sketch", "within": "transform"},
        lambda row: (f"2^{row['log2 D']}", row["of a gradient"]),
    )


_PRODUCT = {
    "method": "product",
    "error, random": "error, random vectors",
    "asked ": "asked ",
    "error, dominant": "error, dominant eigenvector",
    "asked  ": "asked  ",
    "cost in gradients": "gradients",
    "asked": "asked",
    "peak memory": "peak memory",
}
_PEER = {
    "tool": "tool",
    "in gradients": "product, in its own gradients",
    "product, s": "product, s",
    "error": "error against float64",
    "Lanczos step, s": "Lanczos step, s",
    "peak memory, GB": "peak memory, GB",
}
TABLES: dict[str, Callable[[], str]] = {
    "four": four,
    "right": right,
    "in-programs": in_programs,
    "in-training": lambda: table(
        [{"what": row["what"], "asked": row.get("asked", ""), "measured": row["measured"]} for row in rows("in_training")]
    ),
    "cost": cost,
    "space": space,
    "stopped": stopped,
    "pairs": pairs,
    "planned": planned,
    "weak": weak,
    "blocks": blocks,
    "sketch-cost": sketch_cost,
    "intrinsic": intrinsic,
    "intake": intake,
    "trusted": trusted,
    "products": lambda: chosen("products", _PRODUCT),
    "compiled": lambda: chosen(
        "compiled",
        {
            "tokens": "tokens",
            "product": "product",
            "eager, gradients": "gradients",
            "compiled, gradients": "gradients, compiled",
            "asked": "asked",
            "eager, error": "error",
            "compiled, error": "error, compiled",
            "eager, GB": "peak, GB",
            "compiled, GB": "peak, GB, compiled",
            "compiling, s": "compiling, s",
        },
    ),
    "startup": lambda: table(
        [
            {
                "what": row["what"],
                "asked": row.get("asked", ""),
                "CPU seconds": row["measured"],
                "before": row.get("before", ""),
                "files": row.get("files", ""),
            }
            for row in rows("startup")
            if not row["what"].startswith("imports")
        ]
    ),
    "causal-lms": causal_lms,
    "loading": loading,
    "architectures-right": lambda: architectures("yes"),
    "architectures-wrong": lambda: architectures("no"),
    "architectures-none": lambda: architectures(""),
    "kernels": lambda: table(rows("compiled_kernels")),
    "long-sequences": lambda: table(rows("long_sequences")),
    "four-probes": lambda: table(rows("four_probes")),
    "products-1b": lambda: chosen("products_llama_1b", _PRODUCT),
    "products-05b": lambda: chosen("products_llama_05b", _PRODUCT),
    "peers": lambda: chosen("peers", _PEER),
    "peers-gpt2": lambda: chosen("peers_gpt2", _PEER),
    "classes": lambda: table(rows("papyan_digits")),
    "sub-block": lambda: table(rows("sub_block")),
    "dynamics": lambda: chosen(
        "dynamics_smollm2",
        {
            **{name: name for name in ("step", "loss", "λ max", "λ min", "R_NEG", "R_5", "outliers", "of the negative end")},
            "gradient mass": "gradient's share in the outliers' space",
            "of the negative end's": "in the negative end's",
        },
    ),
    "sketch-forms": lambda: chosen(
        "sketch_forms",
        {"sketch": "sketch", "within": "transform", "gradient, ratio": "a gradient", "product, ratio": "a product"},
    ),
    "sketch-memory": lambda: table(rows("sketch_memory")),
    "sketch-norms": lambda: pivot(rows("sketch_norms"), {"sketch": "sketch"}, lambda row: (row["vectors"], row["spread"])),
    "sketch-scores": lambda: chosen(
        "sketch_correlation",
        {
            "sketch": "sketch",
            **{
                f"{a}{r}": f"{b}{r}"
                for r in ("0.95", "0.98", "0.99")
                for a, b in (("log2 D for r > ", "r > "), ("paper, ", "paper, r > "))
            },
        },
    ),
    "sketch-eigenvalues": lambda: chosen(
        "sketch_eigenvalues",
        {
            "sketch": "sketch",
            "log2 D": "log2 D",
            "error": "mean error",
            "rescaled": "mean error up to a factor",
            "products": "products",
            "basis vector, MB": "basis vector, MB",
        },
    ),
}


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
