// Who is stuck, and why: troubles by kind, each with its devices and the way to its line of help.

import { address } from "./address.js";
import { node, span, whole } from "./format.js";

// The worst first; metrics/fleet_page/troubles.py has the same.
export const KINDS = ["failed", "certificate", "absent", "quarantined", "weights", "refused", "undelivered", "labels", "no-data", "unusable", "outbox", "link", "hot", "clock", "behind", "waiting", "expiring", "stopped"];
const NAMED = 6;
const order = new Intl.Collator("en", { numeric: true });

export const rank = (device) => (device.troubles?.length ? KINDS.indexOf(device.troubles[0].kind) : KINDS.length);

export const slug = (title) => title.toLowerCase().replace(/[^\w\- ]/g, "").replaceAll(" ", "-");

export function help(title, words = "What to do") {
  const link = node("a", "help-link", words);
  link.href = `help.html#${slug(title)}`;
  link.setAttribute("aria-label", `What to do: ${title}`);
  return link;
}

export const since = (trouble, now) => `since ${new Date(trouble.since_unix_s * 1000).toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" })} (${span(now - trouble.since_unix_s)})`;

export function deviceButton(tier, name) {
  const button = node("button", "link", name);
  button.type = "button";
  button.dataset.device = `${tier}/${name}`;
  button.addEventListener("click", () => address.choose({ device: button.dataset.device }));
  return button;
}

// What is the matter with trainer and fleet, beside single devices.
function ofTheTrainer(view) {
  const { trainer, fleet } = view;
  const found = [];
  if (!trainer.connected) found.push(["Trainer off its broker", "Nothing is journaled or published until it is back.", "SidestreamTrainerOffBroker", true]);
  if ((trainer.backlog ?? 0) > 1000) found.push(["Learner behind", `${whole(trainer.backlog)} records wait to be learnt; the data is safe.`, "SidestreamLearnerBehind", false]);
  if (trainer.inbox_dropped) found.push(["Inbox full", `${whole(trainer.inbox_dropped)} messages found it full; their devices send them again.`, "SidestreamInboxDropping", false]);
  if (fleet.samples_lost) found.push(["Samples lost", `${whole(fleet.samples_lost)} are gone with the trainer's state.`, "SidestreamSamplesLost", true]);
  return found;
}

let shown = "";

export function showTroubles(view, devices) {
  const kinds = new Map();
  for (const device of devices)
    for (const trouble of device.troubles ?? []) {
      if (!kinds.has(trouble.kind)) kinds.set(trouble.kind, []);
      kinds.get(trouble.kind).push([device, trouble]);
    }
  const whole_ = ofTheTrainer(view);
  const told = JSON.stringify([whole_, [...kinds].map(([kind, some]) => [kind, some.map(([d, t]) => [d.tier, d.name, t.words])]), Math.floor(view.now_unix_s / 10)]);
  if (told === shown) return; // a focused button stays
  shown = told;
  const items = whole_.map(([title, words, alert, severe]) => item(title, severe, [node("p", "", words)], help(alert)));
  for (const kind of KINDS) {
    const some = kinds.get(kind)?.sort(([a, s], [b, t]) => s.since_unix_s - t.since_unix_s || order.compare(a.name, b.name));
    if (some) items.push(group(some, view.now_unix_s));
  }
  document.getElementById("trouble-list").replaceChildren(...items);
  const troubled = devices.filter((device) => device.troubles?.length).length;
  document.getElementById("trouble-count").textContent = items.length
    ? `${whole(troubled)} of ${whole(devices.length)} devices`
    : "Nobody: every device does what it should.";
}

function group(some, now) {
  const [, { title, severe }] = some[0];
  const lines = some.slice(0, NAMED).map(([device, trouble]) => {
    const line = node("li");
    line.append(deviceButton(device.tier, device.name), node("span", "words", ` ${trouble.words}`), node("span", "since", ` ${since(trouble, now)}`));
    return line;
  });
  const list = node("ul");
  list.append(...lines);
  const parts = [list];
  if (some.length > NAMED) parts.push(node("p", "more", `and ${whole(some.length - NAMED)} more: the table below begins with them`));
  return item(some.length > 1 ? `${title} · ${whole(some.length)}` : title, severe, parts, help(title));
}

function item(title, severe, parts, link) {
  const made = node("article", `trouble ${severe ? "severe" : ""}`);
  const header = node("header");
  header.append(node("h3", "", title), link);
  made.append(header, ...parts);
  return made;
}
