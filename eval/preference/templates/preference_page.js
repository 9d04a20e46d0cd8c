"use strict";
// The server holds all state: this page shows a pair, sends an answer until it is acknowledged, and shows the next.

const find = (selector) => document.querySelector(selector);
const fieldsets = [...document.querySelectorAll("fieldset")];
const NAME = "preference-rater";
let state = null; // as the server last told it
let answers = {}; // to the questions of the pair that is shown
let busy = false; // an answer is on its way, or the images are
let shownAt = 0;

function notice(text) {
  find("#notice").textContent = text || "";
  find("#notice").hidden = !text;
}

function show(name) {
  for (const part of ["welcome", "rating", "finished"]) find(`#${part}`).hidden = part !== name;
}

// Ask the server; without a connection again and again, since every call may be repeated.
async function call(name, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    let response;
    try {
      response = await fetch(`api/${name}`, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      if (response.status < 500 || response.status === 507) {
        const said = await response.json().catch(() => ({ error: "You are not let in: open the address you were given." }));
        if (response.ok) return said;
        const error = new Error(said.error);
        error.status = response.status;
        throw error;
      }
    } catch (error) {
      if (error.status) throw error;
    }
    notice("No connection to the server. Your answer is kept here; trying again …");
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function ask(name, body) {
  if (busy) return;
  busy = true;
  refresh();
  try {
    state = await call(name, body);
    notice("");
    busy = false;
    await showState();
  } catch (error) {
    busy = false;
    notice(error.message);
    if (error.status === 409) setTimeout(() => ask("state", { rater: body.rater }), 1500);
    else if (name === "vote") answers = {};
    if (name === "join" || name === "state") show("welcome");
    refresh();
  }
}

function loaded(image, url) {
  return new Promise((resolve, reject) => {
    image.onload = () => {
      image.classList.toggle("pixelated", image.naturalWidth <= 128);
      resolve();
    };
    image.onerror = reject;
    image.src = url;
  });
}

async function showState() {
  answers = {};
  closeZoom();
  localStorage.setItem(NAME, state.rater);
  if (!state.trial) return finish();
  show("rating");
  find("#prompt").textContent = state.trial.prompt;
  const lost = state.lost ? ` · ${state.lost} left out: an image is gone` : "";
  find("#progress").textContent = `${state.done + 1} of ${state.total}${lost}`;
  find("#leave").textContent = state.rater;
  find("#bar").setAttribute("aria-valuemax", state.total);
  find("#bar").setAttribute("aria-valuenow", state.done);
  find("#bar span").style.width = `${(100 * state.done) / Math.max(1, state.total)}%`;
  busy = true; // no answer to images that are not there yet
  find("#pair").classList.add("loading");
  refresh();
  const trial = state.trial;
  try {
    await Promise.all(["left", "right"].map((side) => loaded(find(`#${side}`), trial[side])));
  } catch {
    setTimeout(() => { busy = false; ask("state", { rater: state.rater }); }, 800);
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
  const next = fieldsets.find((set) => !answers[set.dataset.question]);
  for (const set of fieldsets) {
    set.classList.toggle("active", set === next);
    for (const button of set.querySelectorAll("button")) {
      button.classList.toggle("chosen", answers[set.dataset.question] === button.dataset.choice);
      button.disabled = busy;
    }
  }
  const last = fieldsets.length === 1 ? answers[fieldsets[0].dataset.question] : null;
  for (const picture of document.querySelectorAll(".picture")) {
    picture.classList.toggle("chosen", picture.dataset.zoom === last);
  }
  find("#skip").disabled = busy;
  find("#undo").disabled = busy || !(state && (state.last || Object.keys(answers).length));
}

function choose(question, choice) {
  if (busy || !state || !state.trial || !question) return;
  answers[question] = choice;
  if (fieldsets.some((set) => !answers[set.dataset.question])) return refresh();
  send();
}

function send() {
  const seconds = (performance.now() - shownAt) / 1000;
  ask("vote", { rater: state.rater, trial: state.trial.id, answers: { ...answers }, seconds });
}

function skip() {
  if (busy || !state || !state.trial) return;
  for (const set of fieldsets) answers[set.dataset.question] = "skip";
  send();
}

function undo() {
  if (busy || !state) return;
  if (Object.keys(answers).length) {
    answers = {};
    refresh();
  } else if (state.last) ask("undo", { rater: state.rater, trial: state.last });
}

function zoom(side) {
  const source = find(`#${side}`);
  const image = find("#zoomed img");
  image.src = source.src;
  image.className = source.className;
  image.alt = source.alt;
  find("#zoomed").dataset.side = side;
  const names = matchMedia("(max-width: 40rem) and (orientation: portrait)").matches ? ["Upper", "Lower"] : ["Left", "Right"];
  find("#zoomed span").textContent = names[side === "left" ? 0 : 1];
  find("#zoomed").hidden = false;
  find("#zoomed").focus();
}

function closeZoom() {
  find("#zoomed").hidden = true;
}

function nextZoom() {
  if (find("#rating").hidden) return;
  const open = !find("#zoomed").hidden;
  zoom(open && find("#zoomed").dataset.side === "left" ? "right" : "left");
}

function another() {
  localStorage.removeItem(NAME);
  state = null;
  find("#name").value = "";
  show("welcome");
  find("#name").focus();
}

const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie" };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !find("#welcome").hidden) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const next = fieldsets.find((set) => !answers[set.dataset.question]);
  if (KEYS[key]) choose(next && next.dataset.question, KEYS[key]);
  else if (key === "s") skip();
  else if (key === "u" || key === "Backspace") undo();
  else if (key === "z") nextZoom();
  else if (key === "Escape") closeZoom();
  else return;
  event.preventDefault();
});
for (const set of fieldsets) {
  for (const button of set.querySelectorAll("button")) {
    button.addEventListener("click", () => choose(set.dataset.question, button.dataset.choice));
  }
}
for (const picture of document.querySelectorAll(".picture")) {
  picture.addEventListener("click", () => zoom(picture.dataset.zoom));
}
find("#join").addEventListener("submit", (event) => {
  event.preventDefault();
  ask("join", { rater: find("#name").value.trim() });
});
for (const [id, action] of Object.entries({
  undo, skip, zoom: nextZoom, zoomed: closeZoom, "undo-last": undo, another, leave: another,
})) find(`#${id}`).addEventListener("click", action);

find("#questions").classList.toggle("several", fieldsets.length > 1);
if (fieldsets.length > 1) document.documentElement.style.setProperty("--more", "6rem");
const known = localStorage.getItem(NAME);
if (known) ask("state", { rater: known });
else {
  show("welcome");
  find("#name").focus();
}
