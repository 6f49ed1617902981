import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

// The station answers under the same address; while the pages are being written, `npm run dev` asks the one of GLADAD_URL.
declare const process: { env: Record<string, string | undefined> };

export default defineConfig({
  plugins: [svelte()],
  base: './',
  build: {
    outDir: '../src/gladad/service/console',
    emptyOutDir: true,
    target: 'es2022',
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    reportCompressedSize: false,
  },
  server: { proxy: { '/v1': process.env.GLADAD_URL ?? 'http://127.0.0.1:8000' } },
});
