"""Golden file for src/text: what Python and Jinja2 make of expressions that chat templates may use.

    python make_python.py

Writes python.json beside this script: expressions of our own and their text in the environment of transformers. Needs no
assets. Made with transformers 5.24.0 and Jinja2 3.1.6. What those refuse is `null`.
"""

from transformers.utils.chat_template_utils import render_jinja_template

from make_text import CHAT, CONTEXT, write

# Each is printed with {{ }}, unless it begins with a tag.
EXPRESSIONS = r"""
'%s!' % text
'%s-%d' % ('a', 3)
'%s' % 1.5
'%s %s %s' % (none_value, yes, 1.0)
'%s' % [1, 'a', none]
'%s' % {'a': 1}
'%r %r' % ('a', "it's")
'%d|%i|%u' % (3, -4, 5)
'%d' % 3.99
'%d' % true
'%5d|%-5d|%05d|%+d|% d' % (42, 42, 42, 42, 42)
'%5s|%-5s|%.2s|%5.1s' % ('ab', 'ab', 'abcdef', 'xyz')
'%f %.2f %.0f %8.3f %-8.1f| %08.2f' % (1.5, 2.345, 2.5, 3.14159, 2.0, -1.5)
'%e %.2e %E' % (12345.678, 0.00012, 1.0)
'%g %g %g %.3g' % (1.0, 1e20, 0.0001, 3.14159)
'%x %X %o %#x %#o' % (255, 255, 8, 255, 8)
'%c%c' % ('a', 98)
'%%' % ()
'100%%' % ()
'%d%%' % 5
'%(name)s is %(age)d' % {'name': 'x', 'age': 3}
'%(a)s%(a)r' % {'a': 'q', 'b': 1}
'%s' % ('one',)
'%s %s' % ('one',)
'%s' % ('one', 'two')
'%d' % 'x'
'no format' % 5
'%s' % text | upper
'%s' % 'a' ~ 'b'
'%s' % 'a' + 'b'
'%s' % -3
'%s-' % (1 + 2) * 2
('%s' % 1) == '1'
'%*d' % (5, 42)
'%s%s' % (messages[0].role, messages[0]['content'])
7 % 3
7 % 3 * 2
2 * 7 % 4
7 % -3
-7 % 3
7.5 % 2
-7.5 % 2
2 ** 3 % 5
10 - 7 % 4
10 % 4 + 1
10 % 4 % 3
(3 + 4) % 5
integer % 5 == 2
(text | length) % 3
text | length % 3
loop is defined and 3 % 2
[5 % 3, {'a': 7 % 4}, (9 % 5, 1)]
{% for m in messages %}{{ loop.index0 % 2 == 0 }}{{ '%s.' % loop.index }}{% endfor %}
{% if 5 % 2 == 1 %}odd{% endif %}{% set x = '%02d' % 7 %}{{ x }}
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ loop.index }}{% endif %}{% endfor %}
{%- if 4 % 2 -%} no {%- else -%} yes {%- endif -%}
{{ '%}' }}{{ '{% x %}' }}{# % #}{% raw %}{{ 1 % 2 }}{% endraw %}{{ "%s" % '}}' }}
{%set y=5%3%}{{y%2}}{{ [1,2][3%2] }}
{{ '%s' % text[1:3] }}{{ '%s' % ('a' if yes else 'b') }}{{ 'a' if 3 % 2 else 'b' }}
{{ '%s' % 'ab'.upper() }}{{ not 4 % 2 }}{{ 5 % 3 is odd }}{{ '{:05d} {:,} {:.2f} {:x} {:+d}'.format(42, 1234567, 3.14159, 255, 5) }}
1 // 0
1 % 0
7 // -2
7.5 // 2
-7 // 2.0
2 ** -1
2 ** 0.5
2 ** 100
10 ** 18 * 10
9223372036854775807 + 1
-9223372036854775808 - 1
1 / 3
6 / 2
1e3
1_000
0x1f + 0b11 + 0o17
3 * 'ab'
[1, 2] * 2
(1, 2) + (3,)
'a' in 'abc'
'd' not in text
2 in [1, 2]
'b' in object
1 < 2 < 3
1 < 3 < 2
1 == 1.0 == true
'a' 'b' ~ 1 ~ none ~ 1.5
none == none
not none
true and 'x' or 'y'
0 or '' or 'z'
1 if false
'a' if none else 'b'
true + 1
[] or 'empty'
{} and 1
text[-2:]
text[::2]
text[::-1]
text[5:2]
text[-100:100]
text[1:-1]
list[::-1]
list[-2:]
list[1:3]
[1,2,3,4,5][::2]
[1,2,3,4,5][4:0:-2]
(1,2,3)[1:]
text[0] ~ text[-1]
text[100] is defined
'a.b.c'.split('.')
'a.b.c'.split('.', 1)
'a.b.c'.split('.', maxsplit=1)
'a.b.c'.split(sep='.')
' a b  c '.split()
' a b  c '.split(none, 1)
'a.b.c'.rsplit('.', 1)
'a.b.c'.rsplit('.')
'a.b.c'.rsplit('.', 0)
' a b  c '.rsplit(none, 1)
' a b  c '.rsplit()
'a.b.c'.rsplit('.', 1)[0]
'abc'.split('')
''.split()
''.split(',')
'a\nb\r\nc\rd\x0be\x1cf\u2028g'.splitlines()
'a\nb\n'.splitlines(true)
'a\n\nb\n'.splitlines()
'abc'.partition('b')
'abcbd'.rpartition('b')
'abc'.rpartition('x')
'abc'.partition('')
'xxaxx'.strip('x')
'xyaxy'.lstrip('yx')
'xyaxy'.rstrip('yx')
'abc'.strip('')
' a '.strip(none)
'abc'.removeprefix('ab')
'abc'.removesuffix('bc')
'abc'.startswith('b', 1)
'abc'.startswith(('x', 'a'))
'abc'.endswith('b', 0, 2)
'abc'.endswith(('c', 'x'))
'abc'.startswith('')
'abc'.startswith(1)
'abcabc'.find('c')
'abcabc'.find('c', 3)
'abcabc'.find('x')
'abcabc'.find('a', 1, 3)
'abcabc'.rfind('b')
'abcabc'.rfind('b', 0, 4)
'abcabc'.index('c')
'abcabc'.rindex('c')
'abcabc'.index('x')
'é中x'.find('x')
'abcabc'.count('bc')
'abcabc'.count('a', 1)
'aaaa'.count('aa')
'abc'.count('')
'a-b-c'.replace('-', '+')
'a-b-c'.replace('-', '+', 1)
'abc'.replace('', '-')
'abc'.replace('', '-', 2)
'abc'.replace('b', '')
'a-b'.replace('-', '+', -1)
'a-b'.replace('-', '+', count=1)
'42'.zfill(5)
'-42'.zfill(5)
'+4'.zfill(1)
'ab'.center(7)
'ab'.center(7, '*')
'abc'.center(6, '-')
'ab'.ljust(5) ~ '|'
'ab'.ljust(5, '.')
'ab'.rjust(5)
'ab'.rjust(5, '.')
'ab'.center(5, 'xy')
"they're bill's friends x1y é中".title()
'hELLO wORLD'.capitalize()
'ǆ'.capitalize()
'ﬁx'.title()
'Hello'.swapcase()
'Straße'.casefold()
'Straße'.upper()
'ΑΣ'.lower()
'12'.isdigit()
'1.2'.isdigit()
'²'.isdigit()
'½'.isdigit()
'½'.isnumeric()
'²'.isdecimal()
'12'.isdecimal()
''.isdigit()
'ab1'.isalnum()
'ab '.isalnum()
'中文'.isalpha()
'ab1'.isalpha()
' \n'.isspace()
'AB1'.isupper()
'ab1'.islower()
'1'.islower()
'Ab Cd'.istitle()
'AB'.istitle()
'abc'.isascii()
'é'.isascii()
'a_1'.isidentifier()
'1a'.isidentifier()
', '.join(['a', 'b'])
','.join('abc')
','.join(object)
''.join([])
'a\tb\tc'.expandtabs()
'a\tb'.expandtabs(4)
'{}-{}'.format('a', 1)
'{1}{0}'.format('a', 'b')
'{name}!'.format(name='x')
'{m[role]}'.format(m=messages[0])
'{:>5}|{:<5}|{:^5}|{:*^5}'.format('a', 'b', 'c', 'd')
'{{}}'.format()
'{}'.format(none)
'{}'.format([1, 'a'])
'{}'.format(1.0)
'{:>10}'.format(true)
'{}'.format()
'A'.lower().upper().strip().title()
'abc'.nope()
'abc'.upper(1)
['a', 'b'].index('b')
['a', 'b', 'a'].index('a', 1)
['a', 'b'].index('c')
['a', 'b', 'a'].count('a')
(1, 2, 1).index(2)
(1, 2, 1).count(1)
[1].append(2)
[1].pop()
[1].insert(0, 2)
[1].extend([2])
[3, 1].sort()
[1].reverse()
[1].remove(1)
[1].clear()
[1, 2].copy()
object.get('a')
object.get('zz')
object.get('zz', 5)
object.items() | list
object.keys() | list
object.values() | list
object.copy()
object.pop('a')
object.update({'z': 1})
object.setdefault('z', 1)
object.popitem()
object.clear()
object.nope()
dict(a=1, b='x')
dict({'a': 1}, b=2)
dict([('a', 1), ('b', 2)])
dict(object.items()) == object
{'a': 1, 'b': [1, {'c': none}]}
{'a': 1}.a
{'a': {'items': 3}}.a['items']
[1, 'a', none, true, 1.5, [], {}, (), (1,)]
['it\'s', "a\"b", 'a\'b"c', 'a\\b', 'a\tb\n', 'é中😀', '\x00\x7f\xa0\u200b\ufeff']
[1e16, 1e-5, 0.1, 100.0, -0.0]
range(5, 0, -2) | list
range(3)[1]
range(10)[2:5] | list
range(3) | length
2 in range(3)
range(0) | list
none_value | default('q')
none_value | default('q', true)
none_value | default('q', boolean=true)
missing | default('q')
missing | default(default_value='q', boolean=true)
'' | default('q', true)
0 | d(5, true)
missing | default
false | default('x')
['a', 'b'] | join
['a', 'b'] | join('-')
['a', 'b'] | join(d='-')
messages | join(', ', attribute='role')
messages | join(',', 'role')
[1, none, true, 1.5] | join('|')
'abc' | join(',')
messages | map(attribute='role') | list
messages | map(attribute='nope', default='x') | list
messages | map(attribute='content.0') | list
['a', 'b'] | map('upper') | list
['a', 'b'] | map('replace', 'a', 'x') | list
[1.2, 2.7] | map('int') | list
[['a', 1], ['b', 2]] | map('first') | list
[['a', 1], ['b', 2]] | map(attribute=1) | list
messages | selectattr('role', 'equalto', 'user') | list | length
messages | selectattr('role', 'in', ['system']) | map(attribute='content') | list
messages | selectattr('reasoning') | list | length
messages | selectattr('reasoning', 'defined') | list | length
messages | selectattr('role', '==', 'user') | map(attribute='content') | join
messages | rejectattr('role', 'eq', 'user') | list | length
messages | rejectattr('reasoning', 'defined') | list | length
messages | selectattr('role', 'ne', 'user') | first
[1, 2, 3, 4] | select('odd') | list
[1, 2, 3, 4] | reject('odd') | list
[0, 1, '', 'a', none] | select | list
[0, 1, '', 'a', none] | reject | list
[1, 2, 3] | select('gt', 1) | list
[1, 2, 3] | select('>', 1) | list
[1, 2, 3] | select('divisibleby', 3) | list
['a', 1] | select('string') | list
messages | groupby('role') | list | length
{% for role, items in messages | groupby('role') %}{{ role }}:{{ items | length }} {% endfor %}
{% for g in messages | groupby('role') %}{{ g.grouper }}:{{ g.list | length }} {% endfor %}
{% for k, v in [{'a': 'X'}, {'a': 'x'}, {'b': 1}] | groupby('a', default='none') %}{{ k }}={{ v }} {% endfor %}
[3, 1, 2] | sort
[3, 1, 2] | sort(reverse=true)
['b', 'A', 'c'] | sort
['b', 'A', 'c'] | sort(case_sensitive=true)
['b', 'A', 'c'] | sort(true, true)
messages | sort(attribute='role') | map(attribute='role') | list
messages | sort(attribute='role,content') | map(attribute='content') | list
messages | sort(false, false, 'content') | map(attribute='content') | list
['b', 'a', 'B'] | unique | list
['b', 'a', 'B'] | unique(case_sensitive=true) | list
['b', 'a', 'B'] | unique(true) | list
messages | unique(attribute='role') | map(attribute='role') | list
{'b': 1, 'A': 2} | dictsort
{'b': 1, 'A': 2} | dictsort(true)
{'b': 1, 'A': 2} | dictsort(case_sensitive=true)
{'b': 1, 'a': 2} | dictsort(by='value')
{'b': 1, 'a': 2} | dictsort(false, 'value')
{'b': 1, 'a': 2} | dictsort(reverse=true)
{'a': 1} | items | list
missing | items | list
object | tojson
object | tojson(indent=2)
object | tojson(2)
'é<&>' | tojson
'é' | tojson(ensure_ascii=true)
[1.0, none, true] | tojson(separators=(',', ':'))
{'b': 1, 'a': 2} | tojson(sort_keys=true)
(1, 2) | tojson
range(3) | list | tojson
'a\nb\n\nc' | indent
'a\nb\n\nc' | indent(2)
'a\nb\n\nc' | indent(width=2, first=true)
'a\nb\n\nc' | indent(2, true, true)
'a\nb\n\nc' | indent(blank=true)
'a\nb' | indent('> ')
'a\nb' | indent(width='--', first=true)
'a\nb\n' | indent(2)
' a ' | trim
'xax' | trim('x')
'xax' | trim(chars='x')
'foo bar baz qux' | truncate(9)
'foo bar baz qux' | truncate(9, true)
'foo bar baz qux' | truncate(11)
'foo bar baz qux' | truncate(11, false, '...', 0)
'foo bar baz qux' | truncate(length=9, killwords=true, end='~', leeway=0)
'foo bar' | truncate
'hello world foo' | wordcount
[1, 2, 3, 4, 5] | batch(2) | list
[1, 2, 3, 4, 5] | batch(2, 0) | list
[1, 2, 3, 4, 5] | batch(linecount=2, fill_with='x') | list
[1, 2, 3, 4, 5] | slice(2) | list
[1, 2, 3, 4, 5] | slice(3, 'x') | list
[1, 2, 3, 4, 5] | slice(slices=2, fill_with=0) | list
[1, 2, 3] | sum
[1, 2, 3] | sum(start=10)
[{'a': 1}, {'a': 2}] | sum(attribute='a')
[{'a': 1}, {'a': 2}] | sum('a', 5)
[] | sum
[3, 1, 2] | min
[3, 1, 2] | max
['b', 'A'] | min
['b', 'A'] | max(case_sensitive=true)
['b', 'A'] | min(true)
messages | max(attribute='content')
[] | max
2.567 | round
2.5 | round
3.5 | round
2.567 | round(2)
2.567 | round(1, 'floor')
2.511 | round(method='ceil')
2.567 | round(precision=2, method='floor')
42 | round
1234.5 | round(-2)
'42' | int
'x' | int
'x' | int(5)
'x' | int(default=7)
'ff' | int(base=16)
'0x1f' | int(0, 16)
'0b11' | int(base=2)
'0x1f' | int(base=0)
'3.9' | int
3.9 | int
none | int
true | int
'1.5' | float
'x' | float
'x' | float(1.5)
'x' | float(default=2.0)
none | float
42 | float
1.0 | string
none | string
[1] | string
'abc' | list
{'a': 1} | list
(1, 2) | list
'abc' | first
[] | first
[1, 2] | last
'abc' | last
'abc' | length
object | count
none | length
'abc' | reverse
[1, 2] | reverse | list
'abc' | upper
'ABC' | lower
'hello wORLD-foo_bar' | title
"they're (here) [now] {x} <y>" | title
'hELLO' | capitalize
-5 | abs
-5.5 | abs
'abc' | attr('x')
'a b&c=d/é' | urlencode
{'a': 1, 'b': 'x y'} | urlencode
[('a', 1)] | urlencode
'<b>&"\'' | escape
'<b>' | e | upper
'<b>' | safe
'<b>' | forceescape
'%s-%s' | format('a', 1)
'%(a)s' | format(a=1)
'%d' | format(3.7)
'a-b' | replace('-', '+')
'a-a' | replace('a', 'x', 1)
'a-a' | replace('a', 'x', count=1)
1 | replace(1, 2)
'abc' | center(9)
'abc' | center
'abc' | nope
{'a': 1} is mapping
[1] is mapping
'a' is iterable
1 is iterable
'a' is sequence
{} is sequence
{'a': 1}.items() is sequence
1 is number
1.5 is number
true is number
'1' is number
1 is integer
1.0 is integer
true is integer
1.0 is float
1 is float
'a' is string
none is string
true is boolean
1 is boolean
none is none
missing is none
missing is defined
text is defined
missing is undefined
range is callable
text is callable
raise_exception is callable
none is sameas none
1 is sameas 1
true is sameas(true)
[] is sameas []
1 is eq 1
1 is equalto(1)
1 is ne 2
1 is lt 2
1 is le 1
2 is gt 1
2 is ge 3
1 is lessthan 2
2 is greaterthan(1)
'a' is in 'abc'
1 is in [1, 2]
'x' is not in ['y']
3 is odd
4 is even
6 is divisibleby 3
6 is divisibleby(by=4)
'abc' is lower
'ABC' is upper
'upper' is filter
'nope' is filter
'odd' is test
'nope' is test
'<b>' is escaped
true is true
false is false
1 is true
1 is nope
not 1 is even
1 is not odd
namespace(a=1).a
{% set ns = namespace(a=1, b=[]) %}{% set ns.a = ns.a + 1 %}{% set ns.b = ns.b + [ns.a] %}{{ ns.a }}{{ ns.b }}
{% set ns = namespace({'x': 1}, y=2) %}{{ ns.x }}{{ ns.y }}{{ ns.z is defined }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.reset() }}{{ c.next() }}
{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}
{% set j = joiner() %}{{ j() }}a{{ j() }}b
{% for x in [1, 2, 3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }} {% endfor %}
{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{{ loop.cycle('o', 'e') }}{{ loop.previtem }}{{ loop.nextitem }} {% endfor %}
{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{% for x in [] %}a{% else %}empty{% endfor %}
{% for x in [1, 2, 3] if x > 1 %}{{ loop.index }}{{ x }}{% endfor %}
{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}
{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% for c in 'abc' %}{{ c }},{% endfor %}
{% for k in object %}{{ k }}{% endfor %}
{% for x in missing %}a{% endfor %}
{% for x in 5 %}{% endfor %}
{% set x = 1, 2 %}{{ x }}
{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x | length }}
{% set x | upper %}abc{% endset %}{{ x }}
{% filter replace('a', 'b') %}aXa{% endfilter %}
{% filter upper | trim %} abc {% endfilter %}
{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=5, a=4) }}{{ m() }}
{% macro m(a) %}{{ caller() }}{{ a }}{% endmacro %}{% call m(1) %}body{% endcall %}
{% macro m(xs) %}{% for x in xs %}{{ caller(x) }}{% endfor %}{% endmacro %}{% call(x) m([1, 2]) %}<{{ x }}>{% endcall %}
{% macro m() %}x{% endmacro %}{{ m.name }}{{ m() | upper }}{{ m() | length }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% with a = 1 %}{{ a }}{% endwith %}{{ a is defined }}
{% if missing %}a{% elif none_value %}b{% elif list %}c{% endif %}
{% generation %}x{{ 1 }}{% endgeneration %}
{% do [1].append(2) %}
{% set x = [] %}{% set _ = x.append(1) %}{{ x }}
{% include 'x' %}
{% import 'x' as x %}
{% extends 'x' %}
{% block a %}x{% endblock %}
{% autoescape true %}{{ '<' }}{% endautoescape %}
{% trans %}x{% endtrans %}
strftime_now('%Y') | length
strftime_now() is string
raise_exception('x')
caller is defined
debug is defined
zip is defined
1 is defined and messages[0].content.upper()
messages | length > 2 and messages[0]['role'] == 'user'
messages[0].role.upper()[0]
messages[-1]['content'][::-1]
(messages | first)['role']
messages[0].get('content', '') | trim
messages[0].items() | list
messages[0] is mapping and messages[0].content is string
'content' in messages[0]
messages[0].content.split(' ')[0].lower()
text.__class__
''.__class__.__mro__
messages.__len__()
{{ 'a' if missing is defined }}|{{ missing }}|{{ none }}
{{ [1, 2] | map('string') | join(' ') }}{{ '\n' }}{{ 'a' ~ '\t' ~ "\\n" }}
{{ (1, 2) == [1, 2] }}{{ [1] == (1,) }}{{ 'a' == 'a' }}{{ 1 == '1' }}{{ {} == [] }}
{{ [1, 2] < [1, 3] }}{{ (1, 'a') < (2,) }}{{ 'a' < 'B' }}
'a' + 1
[1] + 'a'
'a' * 'b'
none + 1
-'a'
+1
'a' 'b' 'c'
"\"'"
""".strip("\n").split("\n")


def templates():
    for line in EXPRESSIONS:
        yield line if line.startswith("{%") or line.startswith("{{") else "{{ " + line + " }}"


def cases():
    chat = [{k: v for k, v in m.items() if v is not None} for m in CHAT]
    for template in templates():
        try:
            (text,), _ = render_jinja_template([chat], chat_template=template, **CONTEXT)
        except Exception as e:
            text = None
            print(f"{template!r}: refused: {e!r}")
        yield {"template": template, "text": text}


if __name__ == "__main__":
    write("python.json", {"context": CONTEXT, "messages": CHAT, "cases": list(cases())})
