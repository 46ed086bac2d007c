// The arena, where a person compares answers without knowing whose they are, and the leaderboard.
//
//     ask -> answers grow at one pace -> all are over: vote -> names -> go on, or the next prompt
//
// A battle's phase is 'answering', 'voting' or 'voted'. Once its answers are over it survives a
// reload of the page. The server takes one vote for each battle.

import {app, element, postJson, say, showError, streamEvents} from './api.js';

// Between two answers: the label, the vote, whether they are good, and the answer to go on with.
const choices = [['A is better', 'left', true, 0], ['Tie', 'tie', true, 0],
                 ['B is better', 'right', true, 1], ['Both are bad', 'tie', false, 0]];
const letter = i => 'ABCDEFGHI'[i];
const quiet = text => element('span', {class: 'quiet'}, text);
// `key`: what does the same, unless one is writing.
const button = (label, onclick, key, disabled = false) =>
  element('button', {type: 'button', onclick, disabled, 'aria-keyshortcuts': key}, label,
          key ? element('kbd', {'aria-hidden': 'true'}, key) : '');

let view = null;        // the elements of the arena
// {phase, battle, token, prompt, answers: [{text, finish}], flipped, result, best}
let battle = JSON.parse(localStorage.battle ?? null);
let texts = [];         // of the answers: text nodes, which grow
let conversation = [];  // the messages that the next prompt goes on from

const isPending = () => battle && battle.phase !== 'voted';
const sendToArena = (what, more) =>
  postJson(`/arena/${what}`, {battle: battle.battle, token: battle.token, ...more});
// The voter is a random name that this browser keeps.
const voter = () => localStorage.voter ??= Array.from(crypto.getRandomValues(new Uint8Array(16)),
  byte => byte.toString(16).padStart(2, '0')).join('');

function setPhase(phase, spoken) {
  battle.phase = phase;
  if (phase === 'answering') delete localStorage.battle;
  else localStorage.battle = JSON.stringify(battle);
  draw();
  (fields('number')[0] ?? view.bar).focus({preventScroll: true});
  say(spoken);
}

// Back to a prompt that can be changed: the last of these messages.
function leave(messages = [], note = '') {
  battle = null;
  conversation = messages.slice(0, -1);
  delete localStorage.battle;
  view.text.value = messages.at(-1)?.content ?? '';
  draw();
  view.bar.textContent = note;
  say(note);
  view.text.focus();
}

const begin = count => Array.from({length: count}, () => ({text: '', finish: null}));

// `messages`: undefined for the next of the server's prompts.
async function ask(messages) {
  showError(null);
  // On a narrow screen one answer is above the other: a coin of its own decides which.
  const flipped = crypto.getRandomValues(new Uint8Array(1))[0] % 2 === 1;
  battle = {prompt: messages ?? [], answers: begin(app.props.arena.answers), best: 0, flipped};
  setPhase('answering', 'Answering');
  try {
    for await (const event of streamEvents('/arena/battle', {voter: voter(), messages})) {
      if (event.answers) {  // the first event, and a second one where some answers are equal
        Object.assign(battle, event, {answers: begin(event.answers)});
        draw();
      } else if (event.delta) {
        event.delta.forEach((text, i) => texts[i].appendData(text));
      } else if (event.same) {
        leave(messages, 'All answers were the same: there is nothing to vote on.');
      } else if (event.done) {
        battle.answers = event.done.map(({finish}, i) => ({text: texts[i].data, finish}));
        setPhase('voting', 'The answers are complete. Your vote, please.');
      }
    }
  } catch (error) {
    leave(messages);
    showError(error);
    if (error.code === 'no_prompts_left') view.next.hidden = true;
  }
}

const stop = () => sendToArena('stop').catch(showError);

async function vote(mine, best) {
  if (battle?.phase !== 'voting' || view.bar.inert) return;
  showError(null);
  view.bar.inert = true;
  const result = await sendToArena('vote', mine).catch(error => {
    if (error.code === 'already_voted') return {};  // only the reply was lost
    if (error.status === 404) leave(battle.prompt);
    showError(error);
  });
  view.bar.inert = false;
  if (!result) return;
  Object.assign(battle, {result, best});
  setPhase('voted', outcome());
}

const undo = () => sendToArena('undo').then(() => {
  battle.result = {models: battle.result.models, undone: true};
  setPhase('voted', outcome());
}, showError);

const choose = ([, side, isGood, best]) => vote({vote: side, good: [isGood, isGood]}, best);

// More than two answers are ranked. Equal places tie: 1, 2, 2, 4.
const fields = type => [...view.answers.querySelectorAll(`input[type=${type}]`)];
function sendRanking(event) {
  event.preventDefault();
  const places = fields('number').map(field => Number(field.value));
  const ranking = places.map(mine => 1 + places.filter(place => place < mine).length);
  vote({ranking, good: fields('checkbox').map(field => field.checked)}, ranking.indexOf(1));
}
// A place moves the focus to the next answer without one: four digits rank four answers.
function onPlace({target}) {
  if (target.value) fields('number').find(field => !field.value)?.focus();
}

function outcome() {
  const {models, votes, undone, leaked} = battle.result;
  const names = new Set(models).size > 1 &&  // one model: its answers were ranked
    models.map((model, i) => `${letter(i)} is ${model}`).join(', ');
  return `The vote ${undone ? 'was taken back' : 'is stored'}${names ? `: ${names}` : ''}.` +
    (leaked ? ' An answer names a model, so the leaderboard does not count it.' : '') +
    (votes ? ` Your votes so far: ${votes}.` : '');
}

function drawAnswer({text, finish}, i) {
  texts[i] = document.createTextNode(text);
  const name = `Answer ${letter(i)}`, max = battle.answers.length;
  const cut = {length: 'Cut off by the limit of tokens.', stopped: 'Stopped.'}[finish];
  const rank = max === 2 || battle.phase !== 'voting' ? [] : [
    element('input', {type: 'number', form: 'ranking', min: 1, max, required: true,
      placeholder: 'place', 'aria-label': `${name}, place`, oninput: onPlace}),
    element('label', {}, element('input', {type: 'checkbox', checked: true,
      'aria-label': `${name} is good`}), ' good')];
  return element('article', {class: 'card', 'aria-label': name},
    element('div', {class: 'tools'}, element('h3', {}, name),
      quiet(battle.result?.models?.[i] ?? ''), ...rank),
    element('p', {class: 'arena-text'}, texts[i]),
    element('p', {class: 'note'}, cut ?? (finish && !text ? 'An empty answer.' : '')));
}

function drawBar() {
  const {phase, answers, result} = battle, disabled = phase !== 'voting';
  if (result) return [outcome(), result.undone ? '' : button('Take the vote back', undo)];
  const other = disabled ? button('Stop', stop, null, !battle.token)
    : button('Skip', () => leave());
  if (answers.length === 2) {
    return [...choices.map((c, i) => button(c[0], () => choose(c), i + 1, disabled)), other];
  }
  return [
    element('form', {id: 'ranking', onsubmit: sendRanking}, element('button', {disabled}, 'Vote')),
    other, quiet(`1 is the best place, ${answers.length} the last; equal places are a tie.`)];
}

function draw() {
  const {prompt = conversation, answers = [], flipped, best} = battle ?? {};
  view.thread.replaceChildren(...prompt.map(({role, content}) =>
    element('li', {}, quiet(role), element('p', {class: 'arena-text'}, content ?? ''))));
  view.answers.replaceChildren(...answers.map(drawAnswer));
  view.answers.classList.toggle('flipped', answers.length === 2 && flipped);
  view.bar.replaceChildren(...(battle ? drawBar() : []));
  view.form.hidden = isPending();
  view.text.placeholder = battle ? `Go on with answer ${letter(best)}` : 'Your prompt';
  view.fresh.hidden = !prompt.length;
}

function send(event) {
  event.preventDefault();
  const content = view.text.value.trim();
  if (!content || isPending()) return;
  view.text.value = '';
  const earlier = !battle ? conversation :
    [...battle.prompt, {role: 'assistant', content: battle.answers[battle.best].text}];
  ask([...earlier, {role: 'user', content}]);
}

function onKey(event) {
  if (view.section.hidden || event.target.closest('input, textarea')) return;
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const choice = battle?.answers.length === 2 && choices[event.key - 1];
  if (choice) choose(choice);
  else if (event.key === 'Escape' && battle?.phase === 'answering' && battle.token) stop();
  else if (event.key.toLowerCase() === 'n' && view.next && !isPending()) ask();
}

const howToStart = () => element('p', {}, 'This server has no arena. Start one with two models: ',
  element('code', {}, './serve A B --votes votes.db'));

export function start(section) {
  const {arena} = app.props;
  if (!arena) return section.append(howToStart());
  const [title, lead, sendLabel] = arena.mode === 'compare'
    ? ['Which answer is better?', 'Two models answer. Your vote shows which ones they are.',
       'Ask two models']
    : ['Rank the answers', 'One model answers a prompt several times.',
       `Ask for ${arena.answers} answers`];
  const onEnter = e => e.key === 'Enter' && !e.shiftKey && !e.isComposing && send(e);
  view = {
    section, thread: element('ol', {class: 'arena-thread', 'aria-label': 'Prompt'}),
    answers: element('div', {class: 'answers'}),
    bar: element('div', {class: 'dock tools', role: 'group', 'aria-label': 'Vote', tabindex: -1}),
    text: element('textarea', {rows: 3, 'aria-label': 'Your prompt', onkeydown: onEnter}),
    next: arena.prompts ? button('Next prompt', () => ask(), 'N') : '',
    fresh: button('New conversation', () => leave()),
  };
  view.form = element('form', {onsubmit: send}, view.text, element('p', {class: 'tools'},
    element('button', {class: 'primary'}, sendLabel), view.next, view.fresh));
  section.append(element('h2', {}, title), element('p', {class: 'quiet'}, lead),
    view.thread, view.answers, view.bar, view.form);
  document.addEventListener('keydown', onKey);
  draw();
}

export function show() {}

// ------------------------------------------------------------------------------------------------
// The leaderboard

let board = null, asked = 0;  // the section, and when it was filled, in milliseconds
export const leaderboard = {start(section) { board = section; }, show: showRatings};

// Asks at most every two seconds, and not while a vote is due, which the ratings could sway.
async function showRatings() {
  if (!app.props.arena) return board.replaceChildren(howToStart());
  if (isPending()) {
    asked = 0;
    return board.replaceChildren('The leaderboard waits for your vote ',
      element('a', {href: '#arena'}, 'in the arena'), '.');
  }
  if (Date.now() < asked + 2000) return;
  asked = Date.now();
  const json = await postJson('/arena/leaderboard', {voter: voter()}).catch(showError);
  if (json) board.replaceChildren(element('h2', {}, 'Leaderboard'), ...json.hidden
    ? [`You see it after ten votes, so that it does not sway them. To go: ${json.votes_left}.`]
    : drawRatings(json));
}

const percent = share => `${Math.round(100 * share)} %`;
const cells = (name, row) => row.map(cell => element(name, {}, cell));
const table = (label, head, rows) =>
  element('div', {class: 'table-box', role: 'region', 'aria-label': label, tabindex: 0},
    element('table', {},
      element('thead', {}, element('tr', {}, ...cells('th', head))),
      element('tbody', {}, ...rows.map(([name, ...row]) =>
        element('tr', {}, element('th', {scope: 'row'}, name), ...cells('td', row))))));

function drawRatings({votes, counted, players, pairs, left, longer, top, not_connected: apart}) {
  const all = [...players, ...apart];
  const nameOf = ({model, weights}) =>  // a model that was trained on is another player
    all.filter(p => p.model === model).length > 1 ? `${model} (${weights})` : model;
  const names = players.map(nameOf);
  const begin = Math.min(...players.map(p => p.low)), end = Math.max(...players.map(p => p.high));
  const bar = player => {  // a point on its interval; all on one axis
    const e = element('span', {class: 'interval'});
    for (const name of ['low', 'rating', 'high']) {
      e.style.setProperty(`--${name}`, (player[name] - begin) / (end - begin));
    }
    return e;
  };
  const range = ({low, high}) => `${Math.round(low)} to ${Math.round(high)}`;
  const place = p => {  // "1 to 2" where intervals overlap
    const last = players.length - players.filter(other => other.high < p.low).length;
    return p.rank === last ? last : `${p.rank} to ${last}`;
  };
  const beats = (row, column) => {
    const pair = pairs.find(({a, b}) => Math.min(row, column) === a && Math.max(row, column) === b);
    return pair ? percent(pair.a === row ? pair.beats : 1 - pair.beats) : '';
  };
  const share = (side, {share, low, high, votes}) => `The ${side} answer won ${percent(share)} ` +
    `of ${votes} decided votes (95 % interval: ${percent(low)} to ${percent(high)}).`;
  const lines = [
    top && (top.settled ? `${names[top.a]} is better than ${names[top.b]}: that is settled.`
      : `Votes on ${names[top.a]} and ${names[top.b]} that would settle which of them is better: ` +
        (top.more_votes ? `about ${top.more_votes} more.` : 'they are equal so far.')),
    left && share('left', left),
    longer && share('longer', longer),
    ...apart.map(p => `${nameOf(p)} is not connected: no path of decided votes leads to it.`),
  ];
  return [
    element('p', {}, `${votes} votes, of which ${counted} compare two models.`),
    ...players.length ? [
      table('Ratings', ['Model', range({low: begin, high: end}), 'Rating', '95 % interval', 'Place',
                        'Won', 'Tied', 'Lost'],
        players.map((p, i) => [names[i], bar(p), Math.round(p.rating), range(p), place(p), p.wins,
                               p.ties, p.losses])),
      element('h3', {}, 'How likely the row beats the column'),
      table('How likely the row beats the column', ['Model', ...names],
        names.map((name, row) => [name, ...names.map((_, column) => beats(row, column))]))] : [],
    element('ul', {}, ...lines.filter(line => line).map(line => element('li', {}, line))),
  ];
}
