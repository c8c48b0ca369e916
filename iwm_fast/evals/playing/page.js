"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const inputOf = (control) => find(`[data-control="${CSS.escape(control.name)}"]`);
const NAMES = { absolute: "imagined", difference: "imagined, effect only", source: "no change" };
let image = 0, isWaiting = false, isStale = false;

function addImage(address, number) {
  const button = document.createElement("button");
  button.innerHTML = "<img>";
  button.firstChild.src = address;
  button.title = button.firstChild.alt = `image ${number + 1}`;
  button.dataset.image = number;
  button.addEventListener("click", () => choose(number));
  find("#images").insertBefore(button, find("#images label"));
}

function choose(number) {
  image = number;
  for (const button of document.querySelectorAll("#images button")) {
    button.setAttribute("aria-pressed", button.dataset.image == number);
  }
  update();
}

function show(answer) {
  for (const [name, address] of Object.entries(answer.pictures)) {
    const picture = find(`[data-picture="${name}"]`);
    if (picture) picture.src = address;
  }
  for (const control of data.controls.filter((item) => !item.isSwitch)) {
    find(`[data-value="${CSS.escape(control.name)}"]`).textContent = answer.captions[control.name] ?? "unchanged";
  }
  find('[data-caption="retrieved"]').textContent = answer.captions.retrieved;
  const largest = Math.max(...Object.values(answer.distances), 1e-9);
  find("#distances").innerHTML = Object.entries(NAMES).map(([name, words]) => {
    const value = answer.distances[name];
    return `<span>${words}</span><div style="width:${100 * value / largest}%"></div><span>${value.toFixed(3)}</span>`;
  }).join("");
  find("#message").textContent = "";
}

// One request at a time: what moved meanwhile is asked for once the answer is there.
async function ask() {
  if (isWaiting) { isStale = true; return; }
  isWaiting = true;
  const values = {}, switchedOn = [];
  for (const control of data.controls) {
    const input = inputOf(control);
    if (control.isSwitch) { if (input.checked) switchedOn.push(control.name); } else values[control.name] = Number(input.value);
  }
  try {
    const reply = await fetch("answer", { method: "POST", body: JSON.stringify({ image, values, switchedOn }) });
    const answer = await reply.json();
    if (reply.ok) show(answer); else find("#message").textContent = answer.error;
  } catch (error) {
    find("#message").textContent = `The server does not answer (${error.message}). Is \`iwm play\` still running?`;
  }
  isWaiting = false;
  if (isStale) { isStale = false; ask(); }
}

// Without a server: the answer that was computed for the nearest value, all other controls being neutral.
function lookUp(moved) {
  const answers = data.answers;
  for (const control of data.controls) {
    if (control === moved) continue;
    const input = inputOf(control);
    if (control.isSwitch) input.checked = false; else input.value = control.neutral;
  }
  let key = `${image}`;
  if (moved && moved.isSwitch) key += inputOf(moved).checked ? `|${moved.name}` : "";
  if (moved && !moved.isSwitch) {
    const last = answers.numSteps - 1, input = inputOf(moved);
    const index = Math.round((Number(input.value) - moved.low) / (moved.high - moved.low) * last);
    input.value = moved.low + index / last * (moved.high - moved.low);
    key += `|${moved.name}|${index}`;
  }
  const { pictures, captions, distances } = answers.byKey[key];
  const addresses = Object.entries(pictures).map(([name, number]) => [name, answers.pictures[number]]);
  show({ pictures: Object.fromEntries(addresses), captions, distances });
}

let lastMoved = null;
function update(moved = lastMoved) {
  lastMoved = moved;
  if (data.answers) lookUp(moved); else ask();
}

async function upload(file) {
  const reply = await fetch("image", { method: "POST", body: file });
  const answer = await reply.json();
  if (!reply.ok) { find("#message").textContent = answer.error; return; }
  const known = find(`[data-image="${answer.image}"]`);
  if (known) known.firstChild.src = answer.address; else addImage(answer.address, answer.image);
  choose(answer.image);
}

data.images.forEach(addImage);
for (const control of data.controls) inputOf(control).addEventListener("input", () => update(control));
find("#upload")?.addEventListener("change", (event) => event.target.files[0] && upload(event.target.files[0]));
choose(0);
