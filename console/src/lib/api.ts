// The REST interface of the station, and the key that it may want.
import { askForKey, key } from './access.svelte';

export type Decided = 'accept' | 'warn' | 'reject';
export type Judged = 'good' | 'bad';

export interface Region {
  box: [number, number, number, number];
  area: number;
  peak: number;
  contour: [number, number][];
}

export interface Decision {
  id: string;
  time: string;
  product: string;
  version: number;
  model_id: string;
  calibration_id: string;
  source: string;
  request_id: string;
  image_name: string;
  image_sha256: string;
  width: number;
  height: number;
  score: number;
  warn_limit: number | null;
  reject_limit: number;
  p_value: number;
  decision: Decided;
  step: number;
  regions: Region[];
  brightness: number;
  sharpness: number;
  promise_suspended: boolean;
  milliseconds: number;
  verdict: Judged | null;
}

export interface Drift {
  alarm: boolean;
  evidence: number;
  direction: 'up' | 'down';
  parts: number;
  learning: number;
}

export interface Product {
  name: string;
  active: number | null;
  stopped: string | null;
  suspended: string | null;
  drift: Record<string, Drift>;
  counts: Record<Decided, number>;
  judged: Record<Judged, number>;
}

export interface Version {
  product: string;
  number: number;
  model_id: string;
  calibration_id: string;
  digest: string;
  warn_limit: number | null;
  reject_limit: number;
  created: string;
  who: string;
  note: string;
  active: boolean;
  promise: string;
}

export interface Calibration {
  scores: number[];
  images: number;
  false_reject_rate: number;
  promised_rate: number;
  needed: number;
  method: string;
  statement: string;
  min_area: number;
  masked: boolean;
  aligned: boolean; // parts are turned and moved before they are looked at
  good_parts: boolean; // small pictures of good parts are kept
}

export interface Score {
  id: string;
  version: number;
  score: number;
  decision: Decided;
  verdict: Judged | null;
}

export interface Progress {
  stage: string;
  done: number;
  total: number;
  losses: Record<string, [number, number][]>; // of a training: stage -> steps and mean losses
  examples: { name: string; stage: string; step: number }[];
}

export interface Job {
  id: string;
  created: string;
  who: string;
  kind: string;
  product: string;
  request: Record<string, unknown>;
  state: 'waiting' | 'running' | 'done' | 'failed' | 'cancelled';
  progress: Progress | null;
  result: Record<string, unknown> | null;
  problem: string | null;
}

interface Side {
  good: number;
  false_rejects: number;
  bad: number;
  found: number;
}

/** The result of a feedback job. */
export interface Compared {
  before: Side;
  after: Side;
  golden_changed: string[];
  confirmed_good: number;
  offered: boolean;
  version?: number;
}

export interface Period extends Record<Decided, number> {
  since: string;
  until: string;
}

export interface Golden {
  image_sha256: string;
  image_name: string;
  version: number;
  score: number;
  decision: Decided;
}

export interface Folder {
  name: string;
  images: number;
}

export interface Finding {
  text: string;
  serious: boolean;
  files: string[];
  remarks: string[];
}

export interface FolderCheck {
  layout: string;
  sound: boolean;
  counts: { category: string; split: string; defect_type: string; images: number }[];
  sizes: Record<string, Record<string, number>>;
  findings: Finding[];
  notes: string[];
}

export interface Entry {
  sequence: number;
  time: string;
  who: string;
  kind: string;
  content: Record<string, unknown>;
  hash: string;
}

/** The station refused a request, or did not answer (status 0). */
export class Refused extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly wait = 0,
  ) {
    super(message);
  }
}

async function refusal(response: Response): Promise<Refused> {
  let detail = `the station answered ${response.status}`;
  try {
    detail = (await response.json()).detail ?? detail;
  } catch {
    // not JSON: the status says enough
  }
  return new Refused(response.status, detail, Number(response.headers.get('retry-after') ?? 0));
}

/** A request with the key, which is asked for where it is missing or wrong. */
export async function ask(path: string, options: RequestInit = {}): Promise<Response> {
  for (;;) {
    const used = key();
    const headers = new Headers(options.headers);
    if (used) headers.set('X-API-Key', used);
    let response: Response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error instanceof DOMException && error.name === 'AbortError') throw error;
      throw new Refused(0, 'The station does not answer.');
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (key() === used) await askForKey(used !== null);
  }
}

type Value = string | number | boolean | null | undefined;

/** A path with a query; what is empty is left out. */
export function at(path: string, query: Record<string, Value> = {}): string {
  const known = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== '');
  const text = new URLSearchParams(known.map(([name, value]) => [name, String(value)])).toString();
  return text ? `${path}?${text}` : path;
}

const part = encodeURIComponent;

async function json<T>(path: string, method = 'GET', body?: unknown, signal?: AbortSignal): Promise<T> {
  const options: RequestInit = { method, signal };
  if (body !== undefined) Object.assign(options, { body: JSON.stringify(body), headers: { 'content-type': 'application/json' } });
  return (await ask(path, options)).json();
}

const OCTETS = { 'content-type': 'application/octet-stream' };

export const api = {
  products: () => json<Product[]>('v1/products'),
  product: (name: string) => json<Product>(`v1/products/${part(name)}`),
  versions: (name: string) => json<Version[]>(`v1/products/${part(name)}/versions`),
  calibration: (name: string, number: number) => json<Calibration>(`v1/products/${part(name)}/versions/${number}/calibration`),
  scores: (name: string, limit: number) => json<Score[]>(at(`v1/products/${part(name)}/scores`, { limit })),
  periods: (name: string, days: number, count: number) => json<Period[]>(at(`v1/products/${part(name)}/periods`, { days, count })),
  addLimits: (name: string, body: { model_of: number; warn_limit: number | null; reject_limit: number; note: string }) =>
    json<Version>(`v1/products/${part(name)}/versions`, 'POST', body),
  activate: (name: string, version: number, force = false) =>
    json<Version>(`v1/products/${part(name)}/active`, 'PUT', { version, force }),
  stop: (name: string, reason: string) => json<Product>(at(`v1/products/${part(name)}/stop`, { reason }), 'PUT'),
  golden: (name: string) => json<Golden[]>(`v1/products/${part(name)}/golden`),
  addGolden: (name: string, file: File) =>
    ask(at(`v1/products/${part(name)}/golden`, { name: file.name }), { method: 'POST', body: file, headers: OCTETS }),
  checkGolden: (name: string) =>
    json<{ golden_parts: number; stopped: string | null }>(`v1/products/${part(name)}/golden/check`, 'POST'),
  decisions: (query: Record<string, Value>, signal?: AbortSignal) =>
    json<{ items: Decision[]; next: string | null }>(at('v1/decisions', query), 'GET', undefined, signal),
  decision: (id: string) => json<Decision>(`v1/decisions/${part(id)}`),
  entries: (id: string) => json<Entry[]>(`v1/decisions/${part(id)}/entries`),
  judge: (id: string, verdict: Judged, note = '') =>
    json<Decision>(`v1/decisions/${part(id)}/verdict`, 'PUT', { verdict, note }),
  auditHead: () => json<{ sequence: number; hash: string }>('v1/audit/head'),
  folders: () => json<Folder[]>('v1/data'),
  names: (folder: string) => json<string[]>(at('v1/data/names', { folder })),
  check: (folder: string) => json<FolderCheck>(at('v1/data/check', { folder })),
  put: (folder: string, name: string, content: Blob) =>
    ask(at('v1/data', { folder, name }), { method: 'PUT', body: content, headers: OCTETS }),
  remove: (folder: string, name: string) => ask(at('v1/data', { folder, name }), { method: 'DELETE' }),
  jobs: () => json<Job[]>('v1/jobs'),
  addJob: (body: Record<string, unknown>) => json<Job>('v1/jobs', 'POST', body),
  cancel: (id: string) => json<Job>(`v1/jobs/${part(id)}`, 'DELETE'),
};

const calibrations = new Map<string, Promise<Calibration>>();

/** The calibration of a version, asked for once: versions never change. */
export function calibrationOf(product: string, version: number): Promise<Calibration> {
  const name = `${product}/${version}`;
  let known = calibrations.get(name);
  if (!known) {
    known = api.calibration(product, version);
    calibrations.set(name, known);
    known.catch(() => calibrations.delete(name));
  }
  return known;
}

export const pictures = {
  small: (id: string, side = 160) => at(`v1/decisions/${part(id)}/small.png`, { side }),
  image: (id: string) => `v1/decisions/${part(id)}/image`,
  example: (job: string, name: string, step: number) => at(`v1/jobs/${part(job)}/examples/${part(name)}.png`, { step }),
  nearestGood: (id: string, place: number) => at(`v1/decisions/${part(id)}/nearest-good.png`, { place }),
  map: (id: string) => `v1/decisions/${part(id)}/map.png`,
  reconstruction: (id: string) => `v1/decisions/${part(id)}/reconstruction.png`,
  folder: (folder: string, name: string) => at('v1/data/image', { folder, name }),
  golden: (product: string, sha256: string) => `v1/products/${part(product)}/golden/${sha256}/small.png`,
  ignored: (product: string, version: number) => `v1/products/${part(product)}/versions/${version}/ignored.png`,
};

const rest = (seconds: number) => new Promise((done) => setTimeout(done, 1000 * seconds));

/** Inspect a file; where there is no room, ask again until there is. */
export async function inspect(product: string, file: File): Promise<Decision> {
  const path = at(`v1/products/${part(product)}/inspections`, { name: file.name });
  for (;;) {
    try {
      return await (await ask(path, { method: 'POST', body: file, headers: OCTETS })).json();
    } catch (error) {
      if (!(error instanceof Refused && error.wait > 0)) throw error;
      await rest(error.wait);
    }
  }
}

/** Inspect the picture of a part again, with the version that is active now. */
export async function again(part: Decision): Promise<Decision> {
  const content = await (await ask(pictures.image(part.id))).blob();
  return inspect(part.product, new File([content], part.image_name));
}

/** Do something with each of many files, a few at a time. */
export async function each<T>(items: T[], work: (item: T, index: number) => Promise<void>, width = 2): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const index = next++;
      await work(items[index]!, index);
    }
  };
  await Promise.all(Array.from({ length: Math.min(width, items.length) }, worker));
}

/** Tell a job whenever it changes, until it ends; a broken connection is taken up again. */
export async function follow(id: string, told: (job: Job) => void, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    try {
      const response = await ask(`v1/jobs/${part(id)}/events`, { signal });
      const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
      let text = '';
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const events = (text + value).split('\n\n');
        text = events.pop()!;
        for (const event of events) {
          const data = event.split('\n').find((line) => line.startsWith('data: '));
          if (!data) continue;
          const job: Job = JSON.parse(data.slice(6));
          told(job);
          if (ended(job)) return;
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status === 404) throw error;
    }
    await rest(1);
  }
}

export const ended = (job: Job) => !['waiting', 'running'].includes(job.state);

/** A picture that is no longer the same is asked for again. */
export function forget(path: string) {
  const url = kept.get(path);
  kept.delete(path);
  url?.then(URL.revokeObjectURL, () => undefined);
}

const KEPT = 300;
const kept = new Map<string, Promise<string>>();

/** The URL of a picture, which is fetched with the key and kept as a blob; the ones used longest ago are let go. */
export function picture(path: string): Promise<string> {
  const known = kept.get(path);
  if (known) {
    kept.delete(path);
    kept.set(path, known);
    return known;
  }
  const made = ask(path)
    .then((response) => response.blob())
    .then((blob) => URL.createObjectURL(blob));
  kept.set(path, made);
  made.catch(() => kept.delete(path));
  if (kept.size > KEPT) {
    const [oldest, url] = kept.entries().next().value!;
    kept.delete(oldest);
    url.then(URL.revokeObjectURL, () => undefined);
  }
  return made;
}

/** A picture to draw on a canvas. */
export async function drawable(path: string): Promise<HTMLImageElement> {
  const image = new Image();
  image.src = await picture(path);
  await image.decode();
  return image;
}

export const message = (error: unknown) => (error instanceof Error ? error.message : String(error));
