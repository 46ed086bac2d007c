#!/usr/bin/env python3
"""Pictures of every view of the page of ./serve: light, dark, and as wide as a phone.

    dev/screenshots.py runs/demo/sft runs/demo/grpo -o pictures
"""

import argparse
import base64
import pathlib

import page_views

LOOKS = {'light': {}, 'dark': {'dark': True}, 'phone': {'width': 390, 'height': 844},
         'phone_dark': {'width': 390, 'height': 844, 'dark': True}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='+', help='model directories; two of them for the arena')
    parser.add_argument('-o', '--output', required=True, type=pathlib.Path, help='folder')
    parser.add_argument('--serve', default='./serve', help='the binary')
    parser.add_argument('--web', help='folder of the page; otherwise the one in the binary')
    parser.add_argument('--views', nargs='+', default=page_views.NAMES, choices=page_views.NAMES)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    flags = ['--web', args.web] if args.web else []
    arena = bool({'arena', 'leaderboard'} & set(args.views))
    with page_views.serving(args.models, args.serve, arena, flags) as address, \
            page_views.browsing() as browser:
        for view in args.views:
            browser.look()
            for step in page_views.prepare(browser, address, view):
                for name, look in LOOKS.items():
                    browser.look(**look)
                    path = args.output / f'{view}_{step}_{name}.png'
                    path.write_bytes(base64.b64decode(browser.screenshot()))
                    print(path)
                browser.look()


if __name__ == '__main__':
    main()
