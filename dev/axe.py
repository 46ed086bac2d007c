#!/usr/bin/env python3
"""Checks every view of the page of ./serve for what shuts people out: axe-core's rules (WCAG 2.2 A
and AA, and best practices), in light and dark, as wide as a desk and as a phone.

    pip install --no-deps axe-playwright-python     # holds axe.min.js; Playwright is not needed
    dev/axe.py runs/demo/sft runs/demo/grpo

Prints each violation with its elements, and ends with status 1 when there is one.
"""

import argparse
import importlib.util
import pathlib
import sys

import page_views

LOOKS = {'light': {}, 'dark': {'dark': True}, 'phone': {'width': 390, 'height': 844}}


def axe_source(path):
    if path is None:
        package = importlib.util.find_spec('axe_playwright_python')
        if not package:
            sys.exit('error: axe-core is missing: pip install --no-deps axe-playwright-python')
        path = next(pathlib.Path(package.submodule_search_locations[0]).rglob('axe.min.js'))
    return pathlib.Path(path).read_text(encoding='utf-8')


def violations(browser, source):
    found = browser.run(source + ''';
        return axe.run(document, {resultTypes: ['violations'], reporter: 'v2'})
          .then(({violations}) => violations.map(({id, impact, help, nodes}) => (
            {id, impact, help, nodes: nodes.map(node => (
              {target: node.target.join(' '), html: node.html,
             why: [...node.any, ...node.all, ...node.none].map(check => check.message)}))})));''')
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='+', help='model directories; two of them for the arena')
    parser.add_argument('--serve', default='./serve', help='the binary')
    parser.add_argument('--web', help='folder of the page; otherwise the one in the binary')
    parser.add_argument('--axe', help='axe.min.js; otherwise that of axe-playwright-python')
    parser.add_argument('--views', nargs='+', default=page_views.NAMES, choices=page_views.NAMES)
    args = parser.parse_args()
    source = axe_source(args.axe)
    flags = ['--web', args.web] if args.web else []
    arena = bool({'arena', 'leaderboard'} & set(args.views))
    count = 0
    with page_views.serving(args.models, args.serve, arena, flags) as address, \
            page_views.browsing() as browser:
        for view in args.views:
            browser.look()
            for step in page_views.prepare(browser, address, view):
                for name, look in LOOKS.items():
                    browser.look(**look)
                    found = violations(browser, source)
                    count += len(found)
                    print(f'{view}, {step}, {name}: {len(found)} violations')
                    for violation in found:
                        print(f"  {violation['id']} ({violation['impact']}): {violation['help']}")
                        for node in violation['nodes']:
                            print(f"    {node['target']}: {node['html'][:200]}")
                            for why in node['why']:
                                print(f'      {why}')
                browser.look()
    sys.exit(1 if count else 0)


if __name__ == '__main__':
    main()
