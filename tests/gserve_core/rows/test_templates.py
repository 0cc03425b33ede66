"""Templates: what they make of the columns of a row, and what they cannot do."""

from typing import Any

import pytest

from gserve_core.errors import ConfigError, ItemError
from gserve_core.rows import templates
from gserve_core.rows.templates import SHOWN, Template, column_names

ROW: dict[str, Any] = {
    "title": "Rain",
    "body": None,
    "my column": "spaced",
    "year": 2024,
    "people": 83_000_000,
    "tags": ["wet", "cold"],
    "about": {"items": 3, "by": "Ann"},
    "note": "Tel.: 12345678, or 100% 7654321",
}
WRONG = "the template cannot be filled in"


def render(text: str, row: dict[str, Any] = ROW) -> str:
    return Template(text, "the template").render(row)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{{ title }}: {{ tags[1] }}", "Rain: cold"),
        ("[{{ body }}]", "[]"),
        ("{{ row['my column'] }} {{ row.title }}", "spaced Rain"),
        ("{{ about.by }} {{ about['items'] }}", "Ann 3"),
        ("{% for tag in tags %}{{ loop.index }}/{{ loop.length }} {{ tag }};{% endfor %}", "1/2 wet;2/2 cold;"),
        ("{% for tag in [] %}{{ tag }}{% else %}none{% endfor %}", "none"),
        ("{% for a in tags %}{% for b in tags %}{{ a[0] ~ b[0] }} {% endfor %}{% endfor %}", "ww wc cw cc "),
        ("{{ nope | default('other') }}{{ 1 if nope is defined else 0 }}", "other0"),
        ("{{ title ~ 1 ~ none ~ tags }}", "Rain1None['wet', 'cold']"),
        ("{{ tags + ['x'] }} {{ tags * 2 }}", "['wet', 'cold', 'x'] ['wet', 'cold', 'wet', 'cold']"),
        ("{{ year % 4 }} {{ year ** 2 }} {{ year * people }} {{ -7 // 2 }}", "0 4096576 167992000000 -4"),
        ("{{ '{:,}'.format(people) }} {{ '%d' % people }} {{ '%s'|format(people) }}", "83,000,000 83000000 83000000"),
        ("{{ note.strip().upper() }}", "TEL.: 12345678, OR 100% 7654321"),
        ("{{ note | indent(2, first=true) }}", "  Tel.: 12345678, or 100% 7654321"),
        ("{{ '%-6s|' % title }}{{ title.center(8) }}|{{ 'x'.ljust(3) }}|", "Rain  |  Rain  |x  |"),
        ("{{ about | tojson }}", '{"by": "Ann", "items": 3}'),
        ("a{# not this #}b\n{{ '\\n' }}c", "ab\n\nc"),
        ("{{ tags | sum(start='') }} {{ [1, 2.5] | sum }} {{ [about] | sum(attribute='items') }}", "wetcold 3.5 3"),
        ("{{ tags | join }} {{ tags | map('upper') | join(', ') }}", "wetcold WET, COLD"),
        ("{{ [about] | join('-', 'by') }} {{ tags | join(d='+') }}", "Ann wet+cold"),
        ("{{ ','.join(tags | map('first')) }} {{ ('a' * 1000000 + 'b') | length }}", "w,c 1000001"),
        ("{{ title | replace('R', 'Pl') }} {{ title.replace('ai', 'u') }}", "Plain Run"),
        ("{{ title | replace(old='R', new='v') }} {{ tags | reverse | list }}", "vain ['cold', 'wet']"),
        ("{% set a, b = 1, [2] %}{% for k, v in about | dictsort %}{{ k ~ a ~ b }}{% endfor %}", "by1[2]items1[2]"),
        ("{{ tags | batch(1) | list }} {{ 'wet' in tags }}", "[['wet'], ['cold']] True"),
        ("{{ '%s and %s' | format('a', 'b') }} {{ '{:04d}'.format(7) }} {{ '%05.1f' % 2.5 }}", "a and b 0007 002.5"),
        ("{{ 'a\tb'.expandtabs(4) }} {{ 'ab'.translate({97: 'x'}) }} {{ 2.567 | round(1) }}", "a   b xb 2.6"),
        ("{{ note.split() | length }} {{ (note * 1000).split() | first }} {{ ('x ' * 9) | wordcount }}", "5 Tel.: 9"),
        ("{{ about | tojson(indent=1) | length }} {{ 'a b c' | wordwrap(3) }} {{ 'a' | indent }}", "29 a b\nc a"),
        ("{{ '<b>x</b>' | striptags }} {{ tags | select('in', ['wet']) | list }}", "x ['wet']"),
        ("{{ tags | unique | list | length }} {{ about.keys() | list }}", "2 ['items', 'by']"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_text_is_made_of_the_columns(text: str, made: str) -> None:
    assert render(text) == made


def test_a_column_hides_a_function_of_its_name() -> None:
    assert render("{{ range }} {{ row }} {{ dict }}", {"range": 1, "row": 2, "dict": 3}) == "1 2 3"


@pytest.mark.parametrize(
    "text", ["{{ titel }}", "{{ title }}{{ titel.x }}", "{{ row['titel'] }}", "{{ title ~ titel }}"]
)
def test_a_column_that_is_missing_is_named_with_those_that_are_there(text: str) -> None:
    with pytest.raises(ItemError, match=f"^{WRONG}: .*titel.*; the row has the columns title, body, my column, year"):
        render(text)


def test_a_message_names_some_of_many_columns() -> None:
    assert column_names({}) == "no columns"
    assert column_names({"a": 1, "b": 2}) == "the columns a, b"
    named = column_names({f"c{number}": 0 for number in range(SHOWN + 1)})
    assert named.endswith(f", c{SHOWN - 1}, …")


@pytest.mark.parametrize(
    ("text", "line"), [("{{ title", 1), ("a\nb\n{% if %}", 3), ("a\n{% endfor %}", 2), ("{{ a | nope }}", 1)]
)
def test_a_wrong_template_is_told_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"^the system message is wrong in line {line}: "):
        Template(text, "the system message")


@pytest.mark.parametrize(
    "text",
    [
        "{{ title.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ title | attr('__class__') }}",
        "{{ '{0.__class__}'.format(title) }}",
        "{{ row.__init__.__globals__ }}",
        "{{ range.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% extends '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum() }}",
        "{{ 1 / 0 }}",
        "{{ body.x }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_reaches_nothing_but_the_columns(text: str) -> None:
    with pytest.raises(ItemError, match=f"^{WRONG}: "):
        render(text)


@pytest.mark.parametrize("change", ["tags.append(3)", "tags.clear()", "about.update(by=1)", "row.pop('title')"])
def test_a_template_changes_no_values(change: str) -> None:
    row = {"title": "Rain", "tags": ["wet"], "about": {"by": "Ann"}}
    with pytest.raises(ItemError, match="unsafe"):
        render("{{ " + change + " }}", row)
    assert render("{% set title = 1 %}{{ title }}", row) == "1"
    assert row == {"title": "Rain", "tags": ["wet"], "about": {"by": "Ann"}}


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 100000000 }}",
        "{{ 100000000 * tags }}",
        "{{ 'a' * 1000000 * 1000 }}",
        "{{ 2 ** 1000000 }}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}",
        "{{ range(1000000000) | list }}",
        "{{ '%999999999d' % 3 }}",
        "{{ '%.999999999f' % 3.0 }}",
        "{{ '%*d' % (999999999, 3) }}",
        "{{ '%999999999d' | format(3) }}",
        "{{ '{:>999999999}'.format(3) }}",
        "{{ '{:{w}}'.format(3, w=999999999) }}",
        "{{ title.ljust(999999999) }}",
        "{{ title | center(999999999) }}",
        "{{ title | indent(999999999) }}",
        "{{ tags | batch(999999999, 1) | list }}",
        "{{ ([[1] * 1000] * 60000) | sum(start=[]) | length }}",
        "{{ ([range(99999)] * 1000000) | map('sum') | sum }}",
        "{{ ((range(99999) | list) * 600) | sort | length }}",
        "{{ range(1000) | join('b' * 1000000) | length }}",
        "{{ ('b' * 1000000).join(tags * 1000) | length }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000) | length }}",
        "{{ ('a' * 1000000).replace('', 'b' * 1000) | length }}",
        "{{ ('\t' * 1000000).expandtabs(1000000) | length }}",
        "{{ ('a' * 1000000).translate({97: 'b' * 1000}) | length }}",
        "{{ ('{0}' * 1000).format('b' * 1000000) | length }}",
        "{{ ('%(a)s' * 1000) % {'a': 'b' * 1000000} }}",
        "{{ ('%s' * 1000) | format('b' * 1000000) }}",
        "{{ ('%999999d' * 100).encode() % ((1,) * 100) }}",
        "{{ ('{:999999}' * 100).format(*(1,) * 100) }}",
        "{{ ('a\n' * 1000000) | indent('b' * 1000) | length }}",
        "{{ ('a\n' * 1000000) | indent(1000) | length }}",
        "{{ ('ab ' * 100000) | wordwrap(3, true, 'b' * 1000) | length }}",
        "{{ (range(9999) | list) | tojson(indent=99999) | length }}",
        "{{ ('http://a.b ' * 10000) | urlize(rel='b' * 10000) | length }}",
        "{{ ('<!---->' * 1000000) | striptags }}",
        "{{ ('a b ' * 1000000) | wordwrap(3) | length }}",
        "{{ ('a b ' * 1000000) | title | length }}",
        "{{ ('a' * 900000) | wordwrap(3) | length }}",
        "{{ ('a' * 9000000) | sort | length }}",
        "{{ ('a b ' * 1000000).split() | length }}",
        "{{ 5 | round(-999999999) }}",
        "{% set x %}{% for i in range(300) %}{{ 'b' * 1000000 }}{% endfor %}{% endset %}done",
        "{% macro m() %}{% for i in range(300) %}{{ 'b' * 1000000 }}{% endfor %}{% endmacro %}{{ m() | length }}",
        "{% set n = namespace(l=[]) %}{% set t = 'b' * 1000000 %}{% for i in range(99) %}{% set n.l = n.l + [t] %}"
        "{% endfor %}{{ n.l }}",
        "{{ {}.fromkeys(range(99999), 'b' * 1000000) | string | length }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
    ],
)
def test_a_template_that_would_fill_the_memory_fails_at_once(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 600.0)
    with pytest.raises(ItemError) as refused:
        render(text)
    assert "the template runs for more than" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{% set n = namespace(l=[]) %}{% for i in range(2000) %}{% set n.l = n.l + [{'role': 'user', 'n': [i]}] %}"
         "{% endfor %}{{ n.l | length }}", "2000"),
        ("{{ 'Growth 5% (2023): {} {} {}'.format(1, 2, 3) }}", "Growth 5% (2023): 1 2 3"),
        ("{{ ('{} ' * 40 ~ '5% 2023').format(*range(40)) | length }}", "117"),
        ("{{ 5000000 | center(12) }}", "  5000000   "),
        ("{{ ('b' * 9000000) | tojson(indent=2) | length }}", "9000002"),
        ("{{ (range(99999) | list) | tojson(indent=4) | length }}", "1088881"),
    ],
)  # fmt: skip
def test_what_rows_need_is_within_the_limits(text: str, made: str) -> None:
    assert render(text) == made


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(99999) | map('upper') | select('in', (range(99999) | list)) | list }}",
        "{% for i in range(999) %}{{ ([range(9999)] * 50) | map('sum') | sum }}{% endfor %}",
        "{{ ([[1, 2]] * 90000) | sum(start=[]) | length }}",
        "{% set n = namespace(x='') %}{% for i in range(99999) %}{% set n.x = n.x + 'x' * 100 %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_a_template_runs_for_a_limited_time_for_each_row(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.1)
    template = Template("{% if slow %}" + text + "{% endif %}", "the template")
    for _ in range(2):
        with pytest.raises(ItemError, match=r"^the template runs for more than 0\.1 s$"):
            template.render({"slow": True})
        assert template.render({"slow": False}) == ""
