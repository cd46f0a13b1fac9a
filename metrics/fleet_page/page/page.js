// Puts the fleet on the page.

import { address } from "./address.js";
import { Chart, VERSION } from "./chart.js";
import { DeviceView, eventLines } from "./device.js";
import { Fleet } from "./fleet.js";
import { bytes, capital, clock, figure, node, rate, span, whole } from "./format.js";
import { Table } from "./table.js";
import { showTroubles } from "./trouble.js";

const STATES = ["online", "finished", "silent", "lost", "quarantined", "gone"];
const MOST_DOTS = 600;
const by = (id) => document.getElementById(id);
const fleet = new Fleet();
const table = new Table(fleet);
new DeviceView(fleet);
const charts = {
  quality: new Chart(by("c-quality"), { format: (v) => v.toFixed(2), unit: "share" }),
  loss: new Chart(by("c-loss"), { format: (v) => v.toFixed(2), unit: "loss" }),
  samples: new Chart(by("c-samples"), { format: rate, unit: "samples/s", floor: 0 }),
  bytes: new Chart(by("c-bytes"), { format: bytes, unit: "bytes/s", floor: 0, binary: true }),
};
const cards = new Map();

function say(id, text, className) {
  const element = by(id);
  if (element.textContent !== text) element.textContent = text;
  if (className !== undefined) element.className = className;
}

function mood(view) {
  const { trainer, fleet: all } = view;
  if (!trainer.connected) return ["broker away", "bad"];
  if ((trainer.backlog ?? 0) > 1000) return [`catching up, ${whole(trainer.backlog)} behind`, "warn"];
  if (trainer.final) return ["all learnt", "done"];
  if (!all.online && !trainer.samples) return ["waiting for devices", ""];
  return ["learning", "good"];
}

function showTop(view) {
  const { trainer } = view;
  say("job", view.job);
  say("version", whole(trainer.version ?? 0));
  say("published", whole(trainer.published ?? 0));
  say("since", `${clock(view.started_unix_s)} · ${span(view.now_unix_s - view.started_unix_s)}`);
  const [text, className] = mood(view);
  say("state", text, `pill ${className}`);
  const online = view.fleet.online ?? 0;
  document.title = `${whole(online)} online · ${view.job} · Sidestream`;
}

function big(id, text, small = "") {
  const element = by(id);
  element.replaceChildren(text);
  if (small) element.append(" ", node("small", "", small));
}

function showTiles(view) {
  const { trainer, fleet: all } = view;
  const states = all.states ?? {};
  const known = Object.values(states).reduce((sum, count) => sum + count, 0);
  big("t-devices", whole(all.online ?? 0), `of ${whole(known)}`);
  const troubled = ["lost", "silent", "quarantined"].filter((state) => states[state]);
  say("t-devices-sub", troubled.length ? troubled.map((state) => `${whole(states[state])} ${state}`).join(", ") : `${whole(states.finished ?? 0)} finished`, `sub ${troubled.length ? "bad" : ""}`);
  say("t-quality-name", capital(view.measure));
  big("t-quality", figure(all.quality));
  say("t-quality-sub", all.evaluation_samples ? `on ${whole(all.evaluation_samples)} held-out samples${all.probe_accuracy == null ? "" : `; a linear probe has ${figure(all.probe_accuracy)}`}` : (all.online ? "nothing measured yet" : "no device is there to measure it"));
  big("t-loss", figure(all.loss));
  say("t-loss-sub", "of all that is being learnt");
  showLeft(trainer);
  const last = fleet.points.length - 1;
  big("t-samples", whole(trainer.samples ?? 0), last > 0 ? `${rate(fleet.rateAt(last, "samples"))}/s` : "");
  const unused = all.samples_unused ? `${whole(all.samples_unused)} of ${whole(all.samples_read)} read not used: ${all.unused_why}` : "";
  const gone = [
    all.samples_lost ? `${whole(all.samples_lost)} lost with the trainer's state` : "",
    all.samples_dropped ? `${whole(all.samples_dropped)} dropped by full outboxes` : "",
  ].filter(Boolean).join(", ");
  say("t-samples-sub", [gone, unused].filter(Boolean).join(", ") || `${whole(all.samples_read ?? 0)} read; ${whole(trainer.messages ?? 0)} batches, ${whole(trainer.duplicates ?? 0)} repeats`, `sub ${gone ? "bad" : unused ? "warn" : ""}`);
  big("t-traffic", bytes(trainer.bytes_up ?? 0), "up");
  say("t-traffic-sub", `${bytes(all.bytes_down ?? 0)} received by devices`);
}

// Records that wait, and passes over the journal that are made while none comes.
function showLeft(trainer) {
  const { backlog = 0, passes = 0, owed_rows: owed = 0, samples = 0 } = trainer;
  const left = samples ? owed / samples : 0;
  if (trainer.final) big("t-left", "nothing");
  else if (!samples) big("t-left", "–");
  else big("t-left", left >= 0.05 ? left.toFixed(1) : whole(owed), left >= 0.05 ? `of ${rate(passes)} passes` : "rows");
  const { answers } = trainer;
  if (answers) {
    if (!trainer.final && samples) big("t-left", whole(answers.waiting ?? 0), "batches wait");
    say("t-left-sub", [
      `${whole(answers.outstanding ?? 0)} answers with devices`,
      `gradient ${(answers.gradient_norm ?? 0).toFixed(2)}`,
      `${whole(answers.staleness ?? 0)} batches stale`,
      answers.reused ? `${whole(answers.reused)} reused` : "",
      answers.changed ? `${whole(answers.changed)} as changes` : "",
      answers.lost ? `${whole(answers.lost)} steps lost` : "",
    ].filter(Boolean).join(", "));
    return;
  }
  say("t-left-sub", !samples ? "no sample has come yet" : backlog ? `${whole(backlog)} ${backlog === 1 ? "record waits" : "records wait"}; ${whole(owed)} rows in passes` : owed ? `${whole(owed)} rows over the journal` : "all passes are made");
}

function showCharts(view) {
  const { range, axis } = address.chosen;
  const from_s = range ? view.now_unix_s - Number(range) : -Infinity;
  const first = fleet.points.findIndex((point) => point.at_unix_s >= from_s);
  const points = first < 0 ? [] : fleet.points.slice(first);
  const times = points.map((point) => point.at_unix_s);
  const byTier = (field) => view.tiers
    .map((tier, colour) => ({ name: tier.name, colour, values: points.map((point) => point[field]?.[tier.name] ?? null) }))
    .filter((one) => one.values.some((value) => value != null));
  const rates = (field) => points.map((_, i) => fleet.rateAt(first + i, field));
  by("c-quality").querySelector("figcaption").textContent = `${capital(view.measure)} on the devices, by tier`;
  charts.quality.unit = view.measure.replaceAll("_", " ");
  if (axis === "time") charts.quality.show(times, byTier("quality"));
  else charts.quality.show(...byVersion(view, points), VERSION);
  charts.loss.show(times, byTier("loss"));
  charts.samples.show(times, [{ name: "samples/s", colour: 0, values: rates("samples") }]);
  charts.bytes.show(times, [
    { name: "up", colour: 0, values: rates("bytes_up") },
    { name: "down, to the broker", colour: 1, values: rates("bytes_down") },
  ]);
}

// What each version that a tier used was worth when it was measured last.
function byVersion(view, points) {
  const worth = new Map(view.tiers.map((tier) => [tier.name, new Map()]));
  for (const point of points)
    for (const [tier, version] of Object.entries(point.versions ?? {}))
      if (version && point.quality?.[tier] != null) worth.get(tier)?.set(version, point.quality[tier]);
  const versions = [...new Set([...worth.values()].flatMap((some) => [...some.keys()]))].sort((a, b) => a - b);
  const lines = view.tiers
    .map((tier, colour) => ({ name: tier.name, colour, values: versions.map((version) => worth.get(tier.name).get(version) ?? null) }))
    .filter((one) => one.values.some((value) => value != null));
  return [versions, lines];
}

function makeCard(name, colour) {
  const card = node("article", `card tier s${colour % 8}`);
  const header = node("header");
  const [devices, dots, states, facts] = [node("span"), node("div", "dots"), node("p", "states"), node("dl")];
  header.append(node("h3", "", name), devices);
  dots.setAttribute("aria-hidden", "true");
  card.append(header, dots, states, facts);
  by("tiers").append(card);
  return { card, devices, dots, states, facts };
}

function showTiers(view) {
  const collator = new Intl.Collator("en", { numeric: true });
  const members = new Map(view.tiers.map((tier) => [tier.name, []]));
  for (const device of fleet.devices.values()) members.get(device.tier)?.push(device);
  view.tiers.forEach((tier, colour) => {
    if (!cards.has(tier.name)) cards.set(tier.name, makeCard(tier.name, colour));
    const { card, devices, dots, states, facts } = cards.get(tier.name);
    card.className = `card tier s${colour % 8}`;
    const known = members.get(tier.name).sort((a, b) => collator.compare(a.name, b.name));
    devices.textContent = `${whole(tier.online ?? 0)} of ${whole(known.length)} online`;
    while (dots.children.length > Math.min(known.length, MOST_DOTS)) dots.lastChild.remove();
    known.slice(0, MOST_DOTS).forEach((device, i) => {
      const dot = dots.children[i] ?? dots.appendChild(node("i"));
      const look = device.troubles?.length && device.online ? `${device.state} troubled` : device.state;
      if (dot.className !== look) dot.className = look;
      const title = `${device.name}: ${device.state}`;
      if (dot.title !== title) dot.title = title;
    });
    states.replaceChildren(...STATES.filter((state) => tier.states?.[state]).map((state) => node("span", state, `${whole(tier.states[state])} ${state}`)));
    const versions = tier.version_min == null ? "–" : tier.version_min === tier.version_max ? whole(tier.version_min) : `${whole(tier.version_min)}–${whole(tier.version_max)}`;
    const told = [
      [capital(view.measure), figure(tier.quality)], ["Loss", figure(tier.loss)], ["Version", versions], ["Samples", `${whole(tier.samples ?? 0)} of ${whole(tier.samples_read ?? 0)}`],
      ["Sent", bytes(tier.bytes_up ?? 0)], ["Received", bytes(tier.bytes_down ?? 0)], ["In outboxes", bytes(tier.outbox_bytes ?? 0)], ["Dropped", whole(tier.samples_dropped ?? 0)],
      ...(tier.samples_unused ? [["Not used", whole(tier.samples_unused)]] : []),
      ...(tier.samples_lost ? [["Lost", whole(tier.samples_lost)]] : []),
    ];
    facts.title = tier.account ?? "";
    facts.replaceChildren(...told.map(([name, value]) => {
      const pair = node("div");
      pair.append(node("dt", "", name), node("dd", "", value));
      return pair;
    }));
  });
  for (const [name, { card }] of cards) if (!members.has(name)) { card.remove(); cards.delete(name); }
}

function rows(id, made) {
  document.querySelector(`#${id} tbody`).replaceChildren(...made.map((cells) => {
    const row = node("tr");
    row.append(...cells.map(([text, className]) => node("td", className ?? "", text)));
    return row;
  }));
  by(`${id}-empty`).hidden = made.length > 0;
}

let labelsShown = null;

function showLabels() {
  by("labels-section").hidden = fleet.labels == null;
  if (fleet.labels == null || fleet.labels === labelsShown) return;
  labelsShown = fleet.labels;
  const share = (part, of) => (of ? part / of : null);
  const told = fleet.labels.labels.filter((one) => one.actual || one.answered);
  const f1 = (one) => share(2 * one.right, one.actual + one.answered) ?? 0;
  told.sort((a, b) => f1(a) - f1(b) || b.actual - a.actual);
  rows("labels", told.map((one) => [[one.name, "name"], [figure(f1(one)), "num"], [figure(share(one.right, one.actual)), "num"], [figure(share(one.right, one.answered)), "num"], [whole(one.actual), "num"]]));
  rows("confused", fleet.labels.confused.map((one) => [[one.actual, "name"], [one.answered, "name"], [whole(one.count), "num"]]));
}

let eventsShown = "";

function showEvents() {
  const last = fleet.events[fleet.events.length - 1];
  const told = `${fleet.events.length} ${last?.revision} ${last?.words}`;
  if (told === eventsShown) return;
  eventsShown = told;
  by("events").replaceChildren(...eventLines([...fleet.events].reverse(), true));
  by("events-empty").hidden = fleet.events.length > 0;
}

function showRefused(view) {
  const reasons = [...(view.trainer.refused ?? [])].sort((a, b) => b.count - a.count);
  rows("reasons", reasons.map((one) => [[one.reason.replaceAll("_", " ")], [one.kind], [whole(one.count), "num"]]));
  rows("refusals", fleet.refusals.map((one) => [[clock(one.at_unix_s, true)], [`${one.device} (${one.tier})`, "name"], [one.kind], [one.reason, "why"]]));
}

function age() {
  if (!fleet.view) return;
  say("updated", `${span((Date.now() - fleet.heardAt) / 1000)} ago`);
}

fleet.addEventListener("change", () => {
  const notice = by("notice");
  notice.hidden = fleet.failures < 2;
  if (!notice.hidden) {
    notice.textContent = "The trainer does not answer. What you see is the last that it said; this page asks again by itself.";
    say("state", "no answer", "pill bad");
  }
  if (!fleet.view || fleet.failures) return;
  for (const show of [showTop, showTiles, showCharts, showTiers, showLabels, showEvents, showRefused]) show(fleet.view);
  showTroubles(fleet.view, [...fleet.devices.values()]);
  table.show();
  age();
  document.body.dataset.revision = fleet.revision;
});
for (const [id, key] of [["f-axis", "axis"], ["f-range", "range"]]) {
  const follow = () => { if (by(id).value !== address.chosen[key]) by(id).value = address.chosen[key]; };
  by(id).addEventListener("input", () => address.choose({ [key]: by(id).value }));
  address.addEventListener("change", () => { follow(); if (fleet.view) showCharts(fleet.view); });
  follow();
}
setInterval(age, 1000);
fleet.start();
