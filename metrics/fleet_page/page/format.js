// Figures as people read them.

const WHOLE = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });

export const whole = (value) => (value == null ? "–" : WHOLE.format(value));

export function rate(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  return value >= 100 ? WHOLE.format(value) : value.toFixed(value >= 10 ? 1 : 2).replace(/\.?0+$/, "");
}

export function bytes(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export const figure = (value) => (value == null || !Number.isFinite(value) ? "–" : value.toFixed(3));

export const clock = (unix_s, withSeconds = false) =>
  new Date(unix_s * 1000).toLocaleTimeString("en-GB", withSeconds ? {} : { hour: "2-digit", minute: "2-digit" });

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).replaceAll("_", " ");

export function node(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
