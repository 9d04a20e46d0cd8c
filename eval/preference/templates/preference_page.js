"use strict";
// The server holds all state: this page shows a pair, sends an answer until it is acknowledged, and shows the next.

const find = (selector) => document.querySelector(selector);
const fieldsets = [...document.querySelectorAll("fieldset")];
const zoomed = find("#zoomed");
const NAME = "preference-rater";
let state = null; // as the server last told it
let answers = {}; // to the questions of the pair that is shown
let busy = false; // an answer is on its way, or the images are
let shownAt = 0;

const nextQuestion = () => fieldsets.find((set) => !answers[set.dataset.question]);

function notice(text) {
  find("#notice").textContent = text;
  find("#notice").hidden = !text;
}

function show(name) {
  for (const part of ["welcome", "rating", "finished"]) find(`#${part}`).hidden = part !== name;
  if (name === "welcome") find("#name").focus();
}

// Ask the server; without a connection again and again, since every call may be repeated.
async function call(body) {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    const response = await fetch("answer", request).catch(() => null);
    if (response && (response.status < 500 || response.status === 507)) {
      const refused = { error: "You are not let in: open the address you were given." };
      const said = await response.json().catch(() => refused);
      if (response.ok) return said;
      throw Object.assign(new Error(said.error), { status: response.status });
    }
    notice("No connection to the server. Your answer is kept here; trying again …");
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function ask(body) {
  if (busy) return;
  busy = true;
  refresh();
  try {
    state = await call(body);
    notice("");
    busy = false;
    await showState();
  } catch (error) {
    busy = false;
    notice(error.message);
    answers = {};
    if (error.status === 409) setTimeout(ask, 1500, { rater: body.rater });
    else if (!body.trial) show("welcome");
    refresh();
  }
}

async function load(side) {
  const image = find(`#${side}`);
  image.src = state.trial[side];
  await image.decode();
  image.classList.toggle("pixelated", image.naturalWidth <= 128);
}

async function showState() {
  answers = {};
  zoomed.close();
  localStorage.setItem(NAME, state.rater);
  if (!state.trial) return finish();
  show("rating");
  find("#prompt").textContent = state.trial.prompt;
  const lost = state.lost ? ` · ${state.lost} left out: an image is gone` : "";
  find("#progress").textContent = `${state.done + 1} of ${state.total}${lost}`;
  find("#leave").textContent = state.rater;
  find("#bar").max = state.total;
  find("#bar").value = state.done;
  busy = true; // no answer to images that are not there yet
  find("#pair").classList.add("loading");
  refresh();
  try {
    await Promise.all(["left", "right"].map(load));
  } catch {
    setTimeout(() => { busy = false; ask({ rater: state.rater }); }, 800);
    return;
  }
  find("#pair").classList.remove("loading");
  busy = false;
  shownAt = performance.now();
  refresh();
  if (state.next) for (const side of ["left", "right"]) new Image().src = state.next[side];
}

function finish() {
  const none = state.done === 0;
  find("#finished h1").textContent = none ? "There is nothing to rate." : "Thank you, that was the last pair.";
  const lost = state.lost ? ` ${state.lost} could not be shown: an image is gone.` : "";
  find("#finished p").textContent = none
    ? "The images of this study cannot be read. Please tell whoever sent you here."
    : `You have answered ${state.done} pairs.${lost} You can close this page.`;
  find("#undo-last").hidden = !state.last;
  show("finished");
}

// Show what has been chosen, which question is next, and what can be pressed.
function refresh() {
  for (const set of fieldsets) {
    set.disabled = busy;
    set.classList.toggle("active", set === nextQuestion());
    for (const button of set.querySelectorAll("button")) {
      button.classList.toggle("chosen", answers[set.dataset.question] === button.dataset.choice);
    }
  }
  find("#skip").disabled = busy;
  find("#undo").disabled = busy || !(state && (state.last || Object.keys(answers).length));
}

function choose(question, choice) {
  if (busy || !state || !state.trial) return;
  answers[question] = choice;
  if (nextQuestion()) return refresh();
  const seconds = (performance.now() - shownAt) / 1000;
  ask({ rater: state.rater, trial: state.trial.id, answers, seconds });
}

function skip() {
  for (const set of fieldsets) choose(set.dataset.question, "skip");
}

function undo() {
  if (busy || !state) return;
  if (Object.keys(answers).length) {
    answers = {};
    refresh();
  } else if (state.last) ask({ rater: state.rater, trial: state.last, answers: null });
}

function zoom(side) {
  const source = find(`#${side}`);
  const stacked = matchMedia("(max-width: 40rem) and (orientation: portrait)").matches;
  const names = stacked ? { left: "Upper", right: "Lower" } : { left: "Left", right: "Right" };
  Object.assign(find("#zoomed img"), { src: source.src, className: source.className, alt: source.alt });
  find("#zoomed span").textContent = names[side];
  zoomed.dataset.side = side;
  if (!zoomed.open) zoomed.showModal();
}

function nextZoom() {
  if (!find("#rating").hidden) zoom(zoomed.open && zoomed.dataset.side === "left" ? "right" : "left");
}

function another() {
  localStorage.removeItem(NAME);
  state = null;
  find("#name").value = "";
  show("welcome");
}

const answerNext = (choice) => nextQuestion() && choose(nextQuestion().dataset.question, choice);
const KEYS = {
  arrowleft: () => answerNext("left"), arrowright: () => answerNext("right"), arrowdown: () => answerNext("tie"),
  t: () => answerNext("tie"), s: skip, u: undo, backspace: undo, z: nextZoom,
};
addEventListener("keydown", (event) => {
  const action = KEYS[event.key.toLowerCase()];
  if (!action || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !find("#welcome").hidden) return;
  action();
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.closest("fieldset").dataset.question, button.dataset.choice));
}
for (const picture of document.querySelectorAll(".picture")) {
  picture.addEventListener("click", () => zoom(picture.dataset.zoom));
}
find("#join").addEventListener("submit", (event) => {
  event.preventDefault();
  ask({ rater: find("#name").value.trim() });
});
for (const [id, action] of Object.entries({
  undo, skip, zoom: nextZoom, zoomed: () => zoomed.close(), "undo-last": undo, another, leave: another,
})) find(`#${id}`).addEventListener("click", action);

find("#questions").classList.toggle("several", fieldsets.length > 1);
if (fieldsets.length > 1) document.documentElement.style.setProperty("--more", "6rem");
const known = localStorage.getItem(NAME);
if (known) ask({ rater: known });
else show("welcome");
