"""Several outputs, overrides and filters: recipes, and `resm sweep` on the command line."""

from __future__ import annotations

from typing import Any

from tests.hostile.cases import (
    CUT,
    RECIPE,
    Arrange,
    Case,
    Site,
    bad,
    good,
    mistake,
    plus,
    recipe,
    sparse,
)

NAME = "expected a folder's name"
TWICE = "stands twice"
NUMBER = "expected a number"


def swept(lines: str, *options: str) -> Arrange:
    """`resm sweep` of the site's recipe with more lines."""

    def arrange(site: Site) -> Any:
        _, path, out = recipe(f"{RECIPE}{lines}\n")(site) or ()
        return ["sweep", path, out, *options]

    return arrange


def outputs(entries: str) -> Arrange:
    return swept(f"outputs: {entries}")


def names(*words: str) -> Arrange:
    return outputs("[" + ", ".join(f"{{name: {word}}}" for word in words) + "]")


def command(*options: str) -> Arrange:
    """`resm sweep` of models on the command line."""
    return lambda site: ["sweep", *site.argv(*options)[1:]]


def usage(name: str, arrange: Arrange, *words: str) -> Case:
    return bad(name, arrange, *words, code=2)


def overrides(entries: str) -> Arrange:
    return plus(f"overrides: {entries}")


def listed(count: int, entry: str) -> str:
    return "[" + ", ".join([entry] * count) + "]"


def with_tokenizer(site: Site) -> Any:
    sparse(site.base / "merges.txt", 8 << 20)
    return command("--lambda", ",".join(map(str, range(30))))(site)


LONG = "parameters: {sigma: [" + "1," * 20_000 + "]}\n"

SWEEPS: list[Case] = [
    mistake("outputs is a mapping", outputs("{name: a}"), "outputs: expected a list"),
    mistake("outputs is a text", outputs("abc"), "outputs: expected a list"),
    mistake("outputs is empty", outputs("[]"), "outputs: expected a list"),
    mistake("outputs is nothing", outputs(""), "outputs: expected a list"),
    mistake("an output is a text", outputs("[a]"), "outputs[0]: got 'a'"),
    mistake("an output is nothing", outputs("[~]"), "outputs[0]: got None"),
    mistake("an output without a name", outputs("[{lambda: 1}]"), "outputs[0].name: got None",
            NAME),
    mistake("an unknown key", outputs("[{name: a, lamda: 1}]"), "outputs[0].lamda: unknown key",
            "did you mean 'lambda'?"),
    mistake("models of an output", outputs("[{name: a, models: []}]"),
            "outputs[0].models: unknown"),
    mistake("parameters of an output", outputs("[{name: a, parameters: [1]}]"), "outputs[0]",
            "parameters: got [1]"),
    mistake("method of an output", outputs("[{name: a, merge_method: [resm]}]"), "got ['resm']"),
    mistake("overrides of an output", outputs("[{name: a, overrides: 3}]"), "overrides: expected"),
    mistake("lambda of an output", outputs("[{name: a, lambda: .nan}]"), "outputs[0]", NUMBER),
    mistake("lambda of an output, twice",
            outputs("[{name: a, lambda: 1, parameters: {lambda: 1}}]"),
            "outputs[0]: lambda: stands at the top", "keep one"),
    mistake("mistakes in three outputs",
            outputs("[{name: a, lambda: x}, {name: /}, {name: c, merge_method: tvsm}]"),
            "3 mistakes", "outputs[0]: lambda: got 'x'", "outputs[1].name", "outputs[2]"),
    mistake("a name with a slash", names("a/b"), NAME),
    mistake("a name that goes up", names(".."), NAME),
    mistake("an absolute name", names("/etc"), NAME),
    mistake("a hidden name", names(".a"), NAME),
    mistake("a name like an option", names("-a"), NAME),
    mistake("an empty name", names("''"), NAME),
    mistake("a name with a NUL", names('"a\\0b"'), NAME),
    mistake("a name with a line end", names('"a\\n"'), NAME),
    mistake("a name with escapes", names('"a\\e[2J"'), NAME),
    mistake("a name with backslashes", names("a\\b"), NAME),
    mistake("a name of 300 letters", names("a" * 300), NAME),
    mistake("a name of 400 bytes", names("a" + "\U00020000" * 99), NAME),
    mistake("a name that is a number", names("7"), "outputs[0].name: got 7", NAME),
    mistake("one name twice", names("a", "b", "a"), "outputs[2].name", TWICE),
    mistake("names equal without case", names("mild", "MILD"), "outputs[1].name", TWICE),
    mistake("look-alikes from another alphabet", names("mild", "m\u0456ld"), "outputs[1].name",
            NAME),
    mistake("a Kelvin sign for a K", names("a", "\u212a"), "outputs[1].name", NAME),
    mistake("one name composed and not", names("a\ud55c", "a\u1112\u1161\u11ab"), NAME),
    mistake("the partial folder of another", names("a", "a.partial"), "outputs[1].name", NAME),
    mistake("100,000 outputs", outputs(listed(100_000, "1")), "more than 50000 values"),
    mistake("15,000 outputs", names(*map("o{}".format, range(15_000))), "15000 outputs", "at most"),
    mistake("15,000 outputs that are none", outputs(listed(15_000, "1")), "15000 outputs"),
    mistake("many outputs of long parameters",
            swept(LONG + "outputs: [" + ", ".join(f"{{name: o{i}}}" for i in range(9_000)) + "]"),
            "9000 outputs", "at most"),
    mistake("overrides is a mapping", overrides("{filter: a}"), "overrides: expected a list"),
    mistake("an override is a text", overrides("[mlp]"), "overrides[0]: got 'mlp'"),
    mistake("an override with an empty filter", overrides("[{filter: '', merge_method: tsvm}]"),
            "overrides[0].filter: got ''"),
    mistake("an override with a list of filters", overrides("[{filter: [mlp]}]"), "got ['mlp']"),
    mistake("an override of an unknown method", overrides("[{filter: a, merge_method: tvsm}]"),
            "overrides[0].merge_method", "did you mean 'tsvm'?"),
    mistake("an override with an unknown key", overrides("[{filter: a, lambda: 1}]"),
            "overrides[0].lambda: unknown key"),
    mistake("an override with a wrong value", overrides("[{filter: a, parameters: {sigma: x}}]"),
            "overrides[0].parameters.sigma: got 'x'"),
    mistake("an override for one model of two", overrides("[{filter: a, merge_method: slerp}]"),
            "models: 2 models besides the base; slerp merges 1"),
    mistake("an override for no base", overrides("[{filter: a, merge_method: passthrough}]"),
            "models", "passthrough merges 1"),
    mistake("9000 overrides for one model of two",
            overrides(listed(9_000, "{filter: a, merge_method: slerp}")),
            "1 mistake in", "slerp merges 1"),
    mistake("9000 overrides that are none", overrides(listed(9_000, "1")), "9000 mistakes"),
    mistake("an empty list of filters' values", plus("parameters: {sigma: [{value: []}]}"),
            "parameters.sigma[0].value: got an empty list"),
    mistake("a filter that is a list", plus("parameters: {sigma: [{filter: [a], value: 1}]}"),
            "sigma[0].filter: got ['a']"),
    mistake("an empty mapping for filters", plus("parameters: {sigma: {}}"), "sigma[0]: no value"),
    usage("a sweep of one output", swept(""), "sweep: one output"),
    usage("lambdas beside outputs", swept("outputs: [{name: a}]", "--lambda", "1,2"),
          "lists its outputs"),
    usage("lambda that is a text", command("--lambda", "0.5,abc"), "--lambda: got 'abc'"),
    usage("lambda nan", command("--lambda", "0.5,nan"), "--lambda", "'nan'"),
    usage("lambda inf", command("--lambda", "inf,1"), "--lambda", "'inf'"),
    usage("lambda 1e400", command("--lambda", "1e400"), "--lambda", "'1e400'"),
    usage("lambda 1e300", command("--lambda", "1e300"), "lambdas: got 1e+300", "numbers up to"),
    usage("lambda of 100,000 digits", command("--lambda", "1" * 100_000), "--lambda", CUT),
    usage("lambda with an underscore", command("--lambda", "1_0,2"), "--lambda", "'1_0'"),
    usage("lambda in other digits", command("--lambda", "\u0661"), "--lambda"),
    usage("lambdas that are none", command("--lambda", ""), "--lambda"),
    usage("lambdas that are commas", command("--lambda", ",,"), "--lambda"),
    usage("a lambda that is missing", command("--lambda", "1,,2"), "--lambda"),
    usage("methods that are commas", command("--method", ","), "--method"),
    usage("one lambda twice", command("--lambda", "0.5,1,0.50"), "lambda-0.5", TWICE),
    usage("one method twice", command("--method", "tsvm,tsvm"), "tsvm", TWICE),
    usage("a method that is none", command("--method", "tsvm,tvsm"), "did you mean 'tsvm'?"),
    usage("2000 lambdas", command("--lambda", ",".join(map(str, range(2000)))), "2000 outputs"),
    usage("300 methods", command("--method", ",".join(["tsvm"] * 300)), "300 outputs"),
    usage("a lambda like an option", command("--lambda", "-1,1"), "expected one argument"),
    usage("neither lambda nor method", command(), "one output"),
    usage("a parameter that is none", command("--lambda", "1,2", "--param", "sigm=3"), "'sigma'"),
    usage("weights that do not fit", command("--lambda", "1,2", "--weight", "3"), "one weight"),
    usage("weight nan", command("--lambda", "1,2", "--weight", "nan", "--weight", "1"), NUMBER),
    bad("memory for many outputs", command("--lambda", "1,2", "--memory-budget", "1kB"),
        "for 2 outputs needs more memory than allowed"),
    good("lambdas that round to one name", command("--lambda", "0.1234567,0.1234568")),
    good("30 outputs, a tokenizer of 8 MB", with_tokenizer),
    good("negative lambdas", command("--lambda=-1,1,-.5")),
    good("two methods, one without lambda", command("--method", "linear,tsvm", "--lambda", "1,2")),
    good("a filter that is empty", plus("parameters: {sigma: [{filter: '', value: 2}]}")),
    good("an override that no tensor has", overrides("[{filter: nothing, merge_method: tsvm}]")),
    good("outputs of every kind",
            outputs("[{name: a, lambda: 0.5}, {name: b, merge_method: ties}]")),
]  # fmt: skip
