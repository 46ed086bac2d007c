// A text whose tokens say how likely the model found them, and what else could have come. Write and
// Chat share it.
//
// A token is one of logprobs.content of the API, asked for with "token_details": true:
// {id, token, bytes, logprob, rank, special, top_logprobs: [{id, token, bytes, logprob}]}. logprob
// is null where nothing is known: of a text's first token, and before a token is scored. `typed`
// marks what a person wrote.

import {element} from './api.js';
import {formatNumber, Popover, tokenElement, TokenView} from './tokens.js';

// Surprise is -log2 p. Its classes: up to so many bits.
const kClasses = [
  [1, 'under 1 bit'], [3, '1 to 3'], [6, '3 to 6'], [10, '6 to 10'], [Infinity, 'over 10 bits'],
];
const kModes = {off: 'Off', text: 'Text', background: 'Background'};

export const bitsOf = logprob => -logprob / Math.LN2;
export const isScored = token => typeof token.logprob === 'number';

export function percent(p) {
  return p >= 1e-3 ? `${(100 * p).toFixed(p < .1 ? 2 : 1)} %` : `${(100 * p).toPrecision(2)} %`;
}

export class ScoredTokens extends TokenView {
  // onAlternative   (index, {id, token, bytes, logprob, rank}) when one is chosen for a token
  // onEdit          (index) when the text from a token on shall be written anew
  constructor(box, {label, onAlternative, onEdit, onLeave} = {}) {
    super(box, {label, isProse: true, onLeave, onChoose: () => this.popover.enter()});
    Object.assign(this, {onAlternative, onEdit});
  }

  // The scores of a token that has none yet.
  update(index, scores) {
    Object.assign(this.tokens[index], scores);
    this.decorate(this.parts[index], this.tokens[index]);
  }

  setColouring(mode) { this.element.dataset.colouring = mode; }

  decorate(part, token) {
    part.classList.toggle('typed', Boolean(token.typed));
    if (!part.textContent.trim()) part.setAttribute('aria-label', 'space');
    if (!isScored(token)) return;
    part.dataset.surprise = kClasses.findIndex(([most]) => bitsOf(token.logprob) < most);
  }

  get popover() {
    return thePopover ??= new Popover('scores', {role: 'dialog', label: 'Token'});
  }

  content(token, index) {
    const act = action => () => {
      this.popover.hide();
      action();
    };
    const rows = (token.top_logprobs ?? []).map((top, i) => {
      const bar = element('span'), p = Math.exp(top.logprob);
      bar.style.width = `${100 * p}%`;
      return element('li', {}, element(this.onAlternative ? 'button' : 'div', {
        class: 'alternative', 'aria-current': top.id === token.id && 'true',
        onclick: this.onAlternative && act(() => this.onAlternative(index, {...top, rank: i + 1})),
      }, tokenElement(top, 0), element('span', {class: 'bar'}, bar),
         element('span', {class: 'number'}, percent(p))));
    });
    const place = `token ${formatNumber(index + 1)} of ${formatNumber(this.tokens.length)}`;
    return [
      element('p', {class: 'popover-token'}, tokenElement(token, 0)),
      element('p', {class: 'number'}, scoreText(token)), element('ol', {}, ...rows),
      element('p', {class: 'note'}, `${place}, id ${token.id}`),
      this.onEdit ?
        element('button', {onclick: act(() => this.onEdit(index))}, 'Edit from here') : '',
    ];
  }
}

let thePopover;

function scoreText({logprob, rank}) {
  if (typeof logprob !== 'number') return 'no score: it is the first token, or was not scored yet';
  return `${percent(Math.exp(logprob))}, rank ${formatNumber(rank)}, ` +
         `surprise ${bitsOf(logprob).toFixed(2)} bits`;
}

// Buttons and a legend. The choice is kept, and holds for all `views`.
export function colouringControls(views) {
  const legend = element('ul', {class: 'legend', 'aria-label': 'Surprise in bits'}, ...kClasses.map(
    ([, name], i) => element('li', {}, element('span', {'data-surprise': i}, name))));
  const choose = mode => {
    localStorage.setItem('colouring', mode);
    for (const view of views) view.setColouring(mode);
    legend.dataset.colouring = mode;
    legend.hidden = mode === 'off';
    for (const button of group.children) button.ariaPressed = String(button.value === mode);
  };
  const group = element('div', {class: 'switch', role: 'group', 'aria-label': 'Colour by surprise'},
    ...Object.entries(kModes).map(([mode, name]) =>
      element('button', {type: 'button', value: mode, onclick: () => choose(mode)}, name)));
  const stored = localStorage.getItem('colouring');
  choose(stored in kModes ? stored : 'background');
  return element('div', {class: 'colouring'}, element('span', {class: 'quiet'}, 'Surprise'), group,
                 legend);
}
